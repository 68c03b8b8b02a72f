-- Who may do what. Buyers may also come from another identity provider: nothing that sells refers
-- to this table.
CREATE TABLE users (
    id            uuid           PRIMARY KEY,
    -- Trimmed and lower-cased before it gets here, so that equal addresses are equal bytes.
    email         text           NOT NULL CONSTRAINT users_email_unique UNIQUE
                                 CHECK (email = lower(email) AND length(email) <= 254),
    name          text           NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    password_hash text           NOT NULL,
    role          text           NOT NULL CHECK (role IN ('buyer', 'operator', 'admin')),
    created_at    timestamptz(3) NOT NULL
);

-- One login: a family of refresh tokens, of which the newest is the only live one.
CREATE TABLE sessions (
    id           uuid           PRIMARY KEY,
    user_id      uuid           NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    created_at   timestamptz(3) NOT NULL,
    last_used_at timestamptz(3) NOT NULL,
    -- The end whatever the use; idleness is counted from last_used_at.
    expires_at   timestamptz(3) NOT NULL,
    revoked_at   timestamptz(3)
);
CREATE INDEX sessions_user ON sessions (user_id);

-- Every token of a family, used ones too: that a used one comes again is how theft shows.
CREATE TABLE refresh_tokens (
    -- SHA-256 of the token; the token itself is nowhere.
    hash       bytea          PRIMARY KEY CHECK (length(hash) = 32),
    session_id uuid           NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    -- When it was exchanged for its successor; NULL while it is the live one.
    rotated_at timestamptz(3)
);
CREATE UNIQUE INDEX refresh_tokens_live ON refresh_tokens (session_id) WHERE rotated_at IS NULL;
CREATE INDEX refresh_tokens_session ON refresh_tokens (session_id);
