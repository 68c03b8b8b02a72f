-- What both designs in PostgreSQL sell from, and where the naive design's worker stores.
CREATE TABLE sales (
    id          uuid PRIMARY KEY,
    remaining   integer NOT NULL CHECK (remaining >= 0),
    buyer_limit integer NOT NULL,
    seq         bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);

CREATE TABLE buyers (
    sale_id  uuid NOT NULL,
    buyer_id uuid NOT NULL,
    units    integer NOT NULL,
    PRIMARY KEY (sale_id, buyer_id)
);

CREATE TABLE orders (
    id          uuid PRIMARY KEY,
    sale_id     uuid NOT NULL,
    buyer_id    uuid NOT NULL,
    key         text NOT NULL,
    quantity    integer NOT NULL,
    seq         bigint NOT NULL,
    accepted_at timestamptz(3) NOT NULL,
    UNIQUE (sale_id, buyer_id, key)
);

CREATE FUNCTION purchase(p_sale uuid, p_buyer uuid, p_key text, p_quantity integer, p_id uuid)
RETURNS TABLE (word text, id uuid, quantity integer, seq bigint, accepted_at timestamptz)
LANGUAGE plpgsql AS $$
DECLARE
    sale sales;
    known orders;
    units integer;
BEGIN
    SELECT * INTO sale FROM sales s WHERE s.id = p_sale FOR UPDATE;
    IF NOT FOUND THEN
        RETURN QUERY SELECT 'not_found', p_id, 0, 0::bigint, now();
        RETURN;
    END IF;
    SELECT * INTO known FROM orders o
    WHERE o.sale_id = p_sale AND o.buyer_id = p_buyer AND o.key = p_key;
    IF FOUND THEN
        RETURN QUERY SELECT 'replayed', known.id, known.quantity, known.seq, known.accepted_at;
        RETURN;
    END IF;
    SELECT b.units INTO units FROM buyers b WHERE b.sale_id = p_sale AND b.buyer_id = p_buyer;
    IF coalesce(units, 0) + p_quantity > sale.buyer_limit THEN
        RETURN QUERY SELECT 'buyer_limit', p_id, 0, 0::bigint, now();
    ELSIF sale.remaining = 0 THEN
        RETURN QUERY SELECT 'sold_out', p_id, 0, 0::bigint, now();
    ELSIF sale.remaining < p_quantity THEN
        RETURN QUERY SELECT 'insufficient', p_id, 0, 0::bigint, now();
    ELSE
        INSERT INTO buyers AS b VALUES (p_sale, p_buyer, p_quantity)
        ON CONFLICT (sale_id, buyer_id) DO UPDATE SET units = b.units + excluded.units;
        UPDATE sales s SET remaining = s.remaining - p_quantity, seq = s.seq + 1
        WHERE s.id = p_sale;
        RETURN QUERY
            INSERT INTO orders AS o
            VALUES (p_id, p_sale, p_buyer, p_key, p_quantity, sale.seq + 1, clock_timestamp())
            RETURNING 'accepted', o.id, o.quantity, o.seq, o.accepted_at;
    END IF;
END $$;
