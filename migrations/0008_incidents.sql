-- What was accepted and is lost: who decided to go on without it, and every acceptance that is known.

CREATE TABLE incidents (
    id           uuid PRIMARY KEY,
    partition    smallint NOT NULL CHECK (partition >= 0),
    epoch        integer NOT NULL CHECK (epoch >= 1),
    kind         text NOT NULL CHECK (kind IN ('accepted', 'possible', 'late')),
    recovered_to bigint NOT NULL CHECK (recovered_to >= 0),
    seen_to      bigint NOT NULL CHECK (seen_to >= 0),
    silent_nodes integer NOT NULL DEFAULT 0 CHECK (silent_nodes >= 0),
    reason       text NOT NULL,
    grace_until  timestamptz(3),
    created_at   timestamptz(3) NOT NULL DEFAULT now(),
    UNIQUE (partition, epoch)
);

COMMENT ON TABLE incidents IS 'Losses of acknowledged acceptances, one for each epoch that began without all of the ones before.';
COMMENT ON COLUMN incidents.epoch IS 'The epoch that began without them.';
COMMENT ON COLUMN incidents.kind IS 'accepted: an operator decided to go on without them. possible: nobody lives to say whether there were any. late: a node reported some that nobody had known of.';
COMMENT ON COLUMN incidents.recovered_to IS 'The last journal entry that the epoch has of the ones before.';
COMMENT ON COLUMN incidents.seen_to IS 'The last entry that any node is known to have seen; acceptances between the two are lost. Below recovered_to: none is known.';
COMMENT ON COLUMN incidents.silent_nodes IS 'Nodes that were gone without a last word: what only they answered is in no list.';
COMMENT ON COLUMN incidents.reason IS 'What was wrong with Redis.';
COMMENT ON COLUMN incidents.grace_until IS 'Until when the rounds concerned only redeem receipts, by Redis'' clock.';

CREATE TABLE lost_acceptances (
    order_id    uuid NOT NULL,
    epoch       integer NOT NULL CHECK (epoch >= 0),
    partition   smallint NOT NULL CHECK (partition >= 0),
    incident    uuid REFERENCES incidents (id),
    node        uuid NOT NULL,
    sale        integer NOT NULL CHECK (sale >= 0),
    round       integer NOT NULL CHECK (round >= 1),
    buyer_id    uuid NOT NULL,
    quantity    bigint NOT NULL CHECK (quantity >= 1),
    seq         bigint NOT NULL CHECK (seq >= 1),
    pseq        bigint NOT NULL CHECK (pseq >= 1),
    durability  text NOT NULL CHECK (durability IN ('fast', 'fsync', 'replicated', 'committed')),
    accepted_at timestamptz(3) NOT NULL,
    reported_at timestamptz(3) NOT NULL DEFAULT now(),
    PRIMARY KEY (order_id, epoch)
);

CREATE INDEX lost_acceptances_incident ON lost_acceptances (incident, pseq, order_id);
CREATE INDEX lost_acceptances_in_danger ON lost_acceptances (partition) WHERE incident IS NULL;

COMMENT ON TABLE lost_acceptances IS 'Acceptances that a node answered or got from Redis, and that the store that decides has lost before they were stored. One came back when orders has its id.';
COMMENT ON COLUMN lost_acceptances.incident IS 'Null while it is only in danger: its node has seen Redis without it, and nobody has decided yet.';
COMMENT ON COLUMN lost_acceptances.node IS 'Who reported it first.';
COMMENT ON COLUMN lost_acceptances.epoch IS 'The timeline that accepted it.';

ALTER TABLE rounds ADD COLUMN grace_until timestamptz(3);

COMMENT ON COLUMN rounds.grace_until IS 'Until when it only redeems receipts, because acceptances of it were lost; by Redis'' clock. The operator''s intent is another matter.';

ALTER TABLE dead_letters ADD COLUMN at timestamptz(3);

COMMENT ON COLUMN dead_letters.at IS 'When it happened, by Redis'' clock; null for a letter from before this was kept, or if the entry does not say.';
