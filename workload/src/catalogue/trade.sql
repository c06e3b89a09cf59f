-- What has been traded with the $1 products of seed $2: $3 customers, their $4 orders of the last
-- two years, and what is in stock. One statement: a data-modifying CTE runs once, whoever reads it.
--
-- A few products are ordered often and most hardly ever: the lowest of three draws is likely to be
-- low, and a factor that shares no divisor with most sizes scatters the favourites.
WITH person AS (
    SELECT '{Ada,Amir,Anna,Ben,Carla,Chen,Clara,David,Elif,Emil,Farah,Felix,Grace,Hana,Hugo,Ines,Ivan,Jana,Jonas,Karim,Lea,Lena,Luca,Maja,Marta,Mila,Noah,Olga,Omar,Paula,Priya,Rosa,Samir,Sofia,Tariq,Tom,Vera,Wanda,Yara,Zoe}'::text[] AS first,
           '{Adler,Almeida,Baker,Bauer,Conti,Costa,Dubois,Eriksen,Fischer,Garcia,Haddad,Hansen,Ito,Jansen,Kaya,Keller,Kowalski,Larsen,Lopez,Marino,Meyer,Moreau,Nagy,Novak,Okafor,Olsen,Patel,Petrov,Quinn,Rossi,Santos,Schmidt,Silva,Sato,Tanaka,Urban,Vogel,Weber,Yilmaz,Zeman}'::text[] AS last,
           '{Amsterdam,Athens,Barcelona,Bergen,Berlin,Bologna,Bordeaux,Brno,Copenhagen,Dublin,Galway,Ghent,Graz,Hamburg,Helsinki,Lisbon,Ljubljana,Lyon,Munich,Porto,Riga,Seville,Tallinn,Turin,Utrecht,Vienna,Warsaw,Zagreb,Zurich}'::text[] AS cities
),
customer AS (
    INSERT INTO customers (id, name, email, city, joined_on)
    SELECT c, chosen.first || ' ' || chosen.last,
           lower(chosen.first || '.' || chosen.last) || c || '@example.com', chosen.city,
           date '2019-01-01' + pg_temp.chance($2, c, 24, 1800)::integer
    FROM person,
         generate_series(1, $3) AS c,
         LATERAL (SELECT pg_temp.pick(person.first, $2, c, 21) AS first,
                         pg_temp.pick(person.last, $2, c, 22) AS last,
                         pg_temp.pick(person.cities, $2, c, 23) AS city) AS chosen
),
ordered AS (
    INSERT INTO orders (id, customer_id, status, ordered_at)
    SELECT o, 1 + pg_temp.chance($2, o, 25, $3),
           pg_temp.pick('{paid,shipped,delivered,delivered,delivered,delivered,delivered,returned}',
                        $2, o, 26),
           timestamptz '2026-11-01 00:00+00'
               - pg_temp.chance($2, o, 27, 2 * 365 * 86400) * interval '1 second'
    FROM generate_series(1, $4) AS o
),
item AS (
    INSERT INTO order_items (order_id, line, product_id, quantity, unit_price_cents)
    SELECT o, line, product.id, 1 + pg_temp.chance($2, draw, 32, 3), product.price_cents
    FROM generate_series(1, $4) AS o,
         LATERAL generate_series(1, 1 + pg_temp.chance($2, o, 28, 4)) AS line,
         LATERAL (SELECT o * 8 + line AS draw) AS drawn,
         LATERAL (SELECT 1 + least(pg_temp.chance($2, draw, 29, $1),
                                   pg_temp.chance($2, draw, 30, $1),
                                   pg_temp.chance($2, draw, 31, $1)) * 7919 % $1 AS id) AS favourite
         JOIN products AS product USING (id)
)
INSERT INTO stock (product_id, warehouse, on_hand, reorder_level)
SELECT p, pg_temp.pick('{Ghent,Graz,Lyon,Porto}', $2, p, 33),
       pg_temp.chance($2, p, 34, 400),
       20 + pg_temp.chance($2, p, 35, 100)
FROM generate_series(1, $1) AS p
