-- Who may no longer come in, and machines that come in with a key.
ALTER TABLE users
    ADD COLUMN disabled_at         timestamptz(3),
    ADD COLUMN password_changed_at timestamptz(3);
-- Nodes ask for them every few seconds.
CREATE INDEX users_disabled ON users (disabled_at) WHERE disabled_at IS NOT NULL;
COMMENT ON COLUMN users.disabled_at IS 'Since when the user may do nothing; null if the user may.';
COMMENT ON COLUMN users.password_changed_at IS 'When the user last chose a password, null since registration. Another hash of the same password does not count.';

ALTER TABLE sessions
    ADD COLUMN user_agent text CHECK (char_length(user_agent) BETWEEN 1 AND 200);
COMMENT ON COLUMN sessions.user_agent IS 'What the client called itself at login, shortened; it may have lied. Null if it said nothing.';

-- Access tokens are verified without a database, so nodes ask every few seconds which sessions have
-- ended early. A trigger notes it: nobody can end a session, or delete its user, unheard.
CREATE TABLE ended_sessions (
    session  uuid           PRIMARY KEY,
    ended_at timestamptz(3) NOT NULL
);
CREATE INDEX ended_sessions_ended_at ON ended_sessions (ended_at);
COMMENT ON TABLE ended_sessions IS 'Sessions that ended before their time, for as long as an access token of them could be believed, and some more.';
COMMENT ON COLUMN ended_sessions.ended_at IS 'By PostgreSQL''s clock, so that nodes with clocks of their own miss nothing.';

CREATE FUNCTION session_ended() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO ended_sessions (session, ended_at) VALUES (OLD.id, clock_timestamp())
    ON CONFLICT (session) DO NOTHING;
    RETURN NULL;
END
$$;
CREATE TRIGGER session_revoked AFTER UPDATE OF revoked_at ON sessions
    FOR EACH ROW WHEN (OLD.revoked_at IS NULL AND NEW.revoked_at IS NOT NULL)
    EXECUTE FUNCTION session_ended();
CREATE TRIGGER session_deleted AFTER DELETE ON sessions
    FOR EACH ROW WHEN (OLD.revoked_at IS NULL) EXECUTE FUNCTION session_ended();

CREATE TABLE api_keys (
    id           uuid           PRIMARY KEY,
    user_id      uuid           NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    name         text           NOT NULL CHECK (char_length(name) BETWEEN 1 AND 100),
    hash         bytea          NOT NULL CONSTRAINT api_keys_hash_unique UNIQUE CHECK (length(hash) = 32),
    scopes       text[]         NOT NULL
                 CHECK (cardinality(scopes) >= 1 AND scopes <@ ARRAY ['read', 'buy', 'operate']),
    created_at   timestamptz(3) NOT NULL,
    expires_at   timestamptz(3) CHECK (expires_at > created_at),
    last_used_at timestamptz(3)
);
CREATE INDEX api_keys_user ON api_keys (user_id);
COMMENT ON TABLE api_keys IS 'Keys of machines that act for a user. A key that is revoked is deleted.';
COMMENT ON COLUMN api_keys.hash IS 'SHA-256 of the key; the key itself is nowhere.';
COMMENT ON COLUMN api_keys.scopes IS 'What the key may do of what its user may.';
COMMENT ON COLUMN api_keys.expires_at IS 'Null if it holds until it is revoked.';
COMMENT ON COLUMN api_keys.last_used_at IS 'To the minute; null if it was never used.';
