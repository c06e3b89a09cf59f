-- $1 products, $2 seed, $3 rare words
WITH rare AS (
    -- Each rare word stands in none to three products.
    SELECT 1 + pg_temp.chance($2, 1000 + word.number, copy.number, $1) AS product,
           string_agg('Also known as the ' || word.text || ' edition.', ' '
                      ORDER BY word.number, copy.number) AS remark
    FROM unnest($3::text[]) WITH ORDINALITY AS word(text, number),
         LATERAL generate_series(1, pg_temp.chance($2, word.number, 0, 4)::integer) AS copy(number)
    GROUP BY 1
),
chosen AS (
    SELECT p AS id, d.name AS department,
           pg_temp.pick(d.nouns, $2, p, 1) AS noun,
           pg_temp.pick(d.adjectives, $2, p, 2) AS adjective,
           d.adjectives, d.materials, d.uses, d.features
    FROM generate_series(1, $1::bigint) AS p
    JOIN department d ON d.number = pg_temp.chance($2, p, 3, 8)
)
INSERT INTO products (id, name, department, description, price_cents)
SELECT c.id,
       initcap(c.adjective) || ' ' || c.noun || ' '
           || chr((65 + pg_temp.chance($2, c.id, 4, 26))::integer)
           || (100 + pg_temp.chance($2, c.id, 5, 900)),
       c.department,
       concat_ws(' ', text.description, rare.remark),
       (399 + 100 * (pg_temp.chance($2, c.id, 6, 40) * pg_temp.chance($2, c.id, 7, 12)))::integer
FROM chosen c
CROSS JOIN sentence s
CROSS JOIN LATERAL (
    SELECT string_agg(
               format(part.template, c.noun,
                      CASE part.slot WHEN 10 THEN c.adjective
                           ELSE pg_temp.pick(c.adjectives, $2, c.id, part.slot + 1) END,
                      pg_temp.pick(c.materials, $2, c.id, part.slot + 2),
                      pg_temp.pick(c.uses, $2, c.id, part.slot + 3),
                      pg_temp.pick(c.features, $2, c.id, part.slot + 4)),
               ' ' ORDER BY part.slot) AS description
    FROM (VALUES
        (10, pg_temp.pick(s.openings, $2, c.id, 8)),
        (20, pg_temp.pick(s.middles[1:3], $2, c.id, 9)),
        (30, pg_temp.pick(s.middles[4:6], $2, c.id, 10)),
        (40, pg_temp.pick(s.middles[7:10], $2, c.id, 15)),
        (50, pg_temp.pick(s.closings, $2, c.id, 16))
    ) AS part(slot, template)
) AS text
LEFT JOIN rare ON rare.product = c.id
ORDER BY c.id
