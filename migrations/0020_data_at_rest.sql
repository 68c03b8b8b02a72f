-- E-mail addresses and names may be encrypted, and users may be erased.

ALTER TABLE users
    ALTER COLUMN email DROP NOT NULL,
    ALTER COLUMN name DROP NOT NULL,
    ADD COLUMN data_key     smallint CHECK (data_key BETWEEN 1 AND 255),
    ADD COLUMN email_sealed bytea,
    ADD COLUMN name_sealed  bytea,
    ADD COLUMN email_index  bytea CONSTRAINT users_email_index_unique UNIQUE
                            CHECK (octet_length(email_index) = 32),
    ADD CONSTRAINT users_plain_or_sealed CHECK (
        CASE WHEN data_key IS NULL
             THEN num_nulls(email, name) = 0 AND num_nonnulls(email_sealed, name_sealed, email_index) = 0
             ELSE num_nonnulls(email, name) = 0 AND num_nulls(email_sealed, name_sealed, email_index) = 0
        END);
CREATE INDEX users_data_key ON users (data_key, id);

COMMENT ON COLUMN users.email IS 'Trimmed and lower-cased before it gets here, so that equal addresses are equal bytes; null where it is encrypted.';
COMMENT ON COLUMN users.name IS 'What to call the user; null where it is encrypted.';
COMMENT ON COLUMN users.data_key IS 'The key of STOCKADE_DATA_KEYS that address and name are encrypted with; null where they are not.';
COMMENT ON COLUMN users.email_sealed IS 'Nonce, then AES-256-GCM of the address, bound to table, column, row and key.';
COMMENT ON COLUMN users.name_sealed IS 'The same of the name.';
COMMENT ON COLUMN users.email_index IS 'HMAC-SHA256 of the address: finds it, and says nothing without the key.';

CREATE TABLE erased_users (
    id        uuid PRIMARY KEY,
    erased_at timestamptz(3) NOT NULL DEFAULT now()
);

COMMENT ON TABLE erased_users IS 'Users of whom nothing is kept but what was bought: their id, which points to nobody.';

DROP TRIGGER audit_change ON users;
CREATE TRIGGER audit_change AFTER INSERT OR UPDATE OF role, disabled_at, password_changed_at OR DELETE ON users
    FOR EACH ROW EXECUTE FUNCTION audit_change('id', 'id', 'email', 'name', 'password_hash', 'email_sealed',
                                               'name_sealed', 'email_index');

-- An instant as the API writes it.
CREATE FUNCTION instant(at timestamptz) RETURNS text LANGUAGE sql STABLE
RETURN to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"');

-- What buyers of whom something is kept are looked up by.
CREATE INDEX payments_buyer ON payments (buyer_id);
CREATE INDEX checkouts_buyer ON checkouts (buyer_id);
