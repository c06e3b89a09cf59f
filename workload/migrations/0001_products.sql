-- The catalogue. There is deliberately no index that a search of descriptions could use.
CREATE TABLE products (
    id          bigint  PRIMARY KEY,
    name        text    NOT NULL,
    department  text    NOT NULL,
    description text    NOT NULL,
    price_cents integer NOT NULL CHECK (price_cents > 0)
);

-- What `products` was generated from: one row, written in the transaction that fills it.
CREATE TABLE catalogue (
    only_row   boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    products   bigint      NOT NULL,
    seed       bigint      NOT NULL,
    generation integer     NOT NULL,
    filled_at  timestamptz NOT NULL DEFAULT now()
);
