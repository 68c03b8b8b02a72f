-- What a sale asks of whoever buys, to make bots pay: an account of some age, and work.

ALTER TABLE sales
    ADD COLUMN min_account_age_seconds integer
        CONSTRAINT sales_account_age CHECK (min_account_age_seconds BETWEEN 1 AND 31536000),
    ADD COLUMN proof_of_work_bits smallint
        CONSTRAINT sales_proof_of_work CHECK (proof_of_work_bits BETWEEN 1 AND 24);

COMMENT ON COLUMN sales.min_account_age_seconds IS 'How old the account of a buyer must be; null asks for nothing. Holds for every round, from the moment it is set.';
COMMENT ON COLUMN sales.proof_of_work_bits IS 'Zero bits that the hash of a buyer''s proof of work must begin with: each more doubles the work; null asks for none. Holds for every round, from the moment it is set.';
