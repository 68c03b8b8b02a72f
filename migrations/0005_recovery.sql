-- What must be known before a Redis that has lost something may be rebuilt and sell again.

CREATE TABLE node_floors (
    partition smallint NOT NULL CHECK (partition >= 0),
    node      uuid NOT NULL,
    epoch     integer NOT NULL CHECK (epoch >= 0),
    floor     bigint NOT NULL CHECK (floor >= 0),
    last_word boolean NOT NULL,
    seen_at   timestamptz(3) NOT NULL DEFAULT now(),
    PRIMARY KEY (partition, node)
) WITH (fillfactor = 50);

COMMENT ON TABLE node_floors IS 'How far each node has seen the journal of each partition. What a node has seen may have been acknowledged to a buyer: Redis is rebuilt unasked only if PostgreSQL and the journal have all of it.';
COMMENT ON COLUMN node_floors.node IS 'A process; another one after each start.';
COMMENT ON COLUMN node_floors.epoch IS 'The timeline that it sold in.';
COMMENT ON COLUMN node_floors.floor IS 'The highest entry (pseq) that any reply had shown it.';
COMMENT ON COLUMN node_floors.last_word IS 'Whether it has stopped selling in that epoch, so that the floor is final.';
COMMENT ON COLUMN node_floors.seen_at IS 'Its last sign of life, by PostgreSQL''s clock.';
