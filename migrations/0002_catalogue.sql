-- What is sold.
CREATE TABLE products (
    id             uuid           PRIMARY KEY,
    name           text           NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    description    text           NOT NULL CHECK (length(description) <= 4000),
    -- Minor units.
    price_amount   bigint         NOT NULL CHECK (price_amount BETWEEN 0 AND 100000000000000),
    price_currency text           NOT NULL CHECK (price_currency ~ '^[A-Z]{3}$'),
    -- The ETag; goes up with every change.
    version        bigint         NOT NULL DEFAULT 1,
    -- The request that made it, if it carried an Idempotency-Key: its retry answers the same.
    requested      jsonb,
    created_at     timestamptz(3) NOT NULL,
    updated_at     timestamptz(3) NOT NULL
);
-- One for each way to sort the list; id makes every order total.
CREATE INDEX products_by_created_at ON products (created_at, id);
CREATE INDEX products_by_name       ON products (name, id);
CREATE INDEX products_by_price      ON products (price_amount, id);
