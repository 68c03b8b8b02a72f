-- The end of a round: settled, certified, archived. And what the audit found.

ALTER TABLE rounds
    DROP CONSTRAINT rounds_intent_check,
    ADD CONSTRAINT rounds_intent_check
        CHECK (intent IN ('live', 'paused', 'closed', 'settled', 'archived')),
    ADD COLUMN archived_at timestamptz(3),
    ADD CONSTRAINT rounds_leave_when_archived CHECK (archived_at IS NULL OR intent = 'archived');

COMMENT ON COLUMN rounds.intent IS 'What the operator wants, and how far the end has come: settled makes the orders final, archived leaves them to PostgreSQL. Scheduled, open and past are derived from window and clock, never stored.';
COMMENT ON COLUMN rounds.archived_at IS 'When the last order had left Redis. An archived round without it is on its way out.';

ALTER TABLE round_events
    DROP CONSTRAINT round_events_kind_check,
    ADD CONSTRAINT round_events_kind_check
        CHECK (kind IN ('provision', 'cancel', 'restock', 'pause', 'resume', 'close', 'settle', 'archive'));

CREATE TABLE certificates (
    sale       integer NOT NULL,
    round      integer NOT NULL,
    closed_at  timestamptz(3) NOT NULL,
    issued_at  timestamptz(3) NOT NULL,
    key_id     text NOT NULL,
    public_key text NOT NULL,
    body       jsonb NOT NULL,
    jws        text NOT NULL,
    PRIMARY KEY (sale, round),
    FOREIGN KEY (sale, round) REFERENCES rounds (sale, round)
);

COMMENT ON TABLE certificates IS 'What became of each settled round, signed. The first one stays.';
COMMENT ON COLUMN certificates.closed_at IS 'When selling ended; the time to the archive counts from here.';
COMMENT ON COLUMN certificates.public_key IS 'The Ed25519 key that signed it, base64url: it is served as long as a certificate needs it.';
COMMENT ON COLUMN certificates.body IS 'What is certified, for questions in SQL.';
COMMENT ON COLUMN certificates.jws IS 'The same, signed: header, body and signature as a compact JWS. These bytes count.';

CREATE TABLE audit_runs (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    sale       integer NOT NULL,
    round      integer NOT NULL,
    checked_at timestamptz(3) NOT NULL,
    took_ms    bigint NOT NULL CHECK (took_ms >= 0),
    verdict    text NOT NULL CHECK (verdict IN ('pass', 'fail')),
    cause      text NOT NULL CHECK (cause IN ('patrol', 'settle', 'certify', 'archive')),
    failing    jsonb NOT NULL
);

CREATE INDEX audit_runs_round ON audit_runs (sale, round, id);

COMMENT ON TABLE audit_runs IS 'Full looks at rounds that came to a verdict. Of each round the last hundred passes and the last thousand failures are kept, none longer than thirty days.';
COMMENT ON COLUMN audit_runs.cause IS 'Who looked: the patrol, or the end of the round before its next step.';
COMMENT ON COLUMN audit_runs.failing IS 'The checks that failed, each with what should be and what is.';
