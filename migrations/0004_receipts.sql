-- What an acceptance survives can be asked for per sale; each acceptance carries a signed receipt.

ALTER TABLE sales
    DROP CONSTRAINT sales_durability_check,
    ADD CONSTRAINT sales_durability_check CHECK (durability IN ('default', 'replicated', 'committed'));

ALTER TABLE orders
    DROP CONSTRAINT orders_durability_check,
    ADD CONSTRAINT orders_durability_check
        CHECK (durability IN ('fast', 'fsync', 'replicated', 'committed')),
    ADD COLUMN receipt_key smallint NOT NULL DEFAULT 0 CHECK (receipt_key BETWEEN 0 AND 255);

COMMENT ON COLUMN orders.receipt_key IS 'The key that signed its receipt, so that a replay has the same bytes after the keys have changed; 0 for an order from before there were receipts.';
