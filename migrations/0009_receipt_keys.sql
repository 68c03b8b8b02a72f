-- What each key of receipts is, so that another secret under the same number is noticed.

CREATE TABLE receipt_keys (
    number      smallint PRIMARY KEY CHECK (number BETWEEN 1 AND 255),
    fingerprint bytea NOT NULL CHECK (octet_length(fingerprint) = 8),
    seen_at     timestamptz(3) NOT NULL DEFAULT now()
);

COMMENT ON TABLE receipt_keys IS 'The keys of receipts that any node ever had. A number stands for one secret for ever: with another one, replays and receipts of its orders would have other bytes.';
COMMENT ON COLUMN receipt_keys.fingerprint IS 'Says whether it is the same secret, and nothing about it.';
COMMENT ON COLUMN receipt_keys.seen_at IS 'When a node had it for the first time.';
