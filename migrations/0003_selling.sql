-- Sales, their rounds, and everything that the writer stores from the journal.
--
-- Redis decides and PostgreSQL remembers: below `rounds.provisioned_at`, every row here is a replay
-- of the journal, written in the transaction that moves `journal_positions`. The check constraints
-- repeat the invariants of the domain, so that no hand and no bug can store what may not be.

CREATE TABLE sales (
    id                  uuid PRIMARY KEY,
    number              integer GENERATED ALWAYS AS IDENTITY (START WITH 1) UNIQUE,
    partition           smallint NOT NULL DEFAULT 0 CHECK (partition >= 0),
    product_id          uuid NOT NULL REFERENCES products (id),
    name                text NOT NULL CHECK (char_length(name) BETWEEN 1 AND 200),
    terms               text CHECK (char_length(terms) BETWEEN 1 AND 10000),
    price_amount        bigint NOT NULL CHECK (price_amount BETWEEN 0 AND 100000000000000),
    price_currency      text NOT NULL CHECK (price_currency ~ '^[A-Z]{3}$'),
    allocation          bigint NOT NULL CHECK (allocation BETWEEN 1 AND 10000000),
    per_buyer_limit     bigint NOT NULL CHECK (per_buyer_limit BETWEEN 1 AND 1000000),
    per_order_limit     bigint NOT NULL CHECK (per_order_limit BETWEEN 1 AND per_buyer_limit),
    opens_at            timestamptz(3) NOT NULL,
    closes_at           timestamptz(3) CHECK (closes_at > opens_at),
    durability          text NOT NULL CHECK (durability IN ('default')),
    payment             text NOT NULL CHECK (payment IN ('none')),
    round               integer NOT NULL DEFAULT 1 CHECK (round >= 1),
    version             bigint NOT NULL DEFAULT 1 CHECK (version >= 1),
    created_by          uuid NOT NULL,
    request_fingerprint bytea NOT NULL CHECK (octet_length(request_fingerprint) = 8),
    created_at          timestamptz(3) NOT NULL DEFAULT now(),
    updated_at          timestamptz(3) NOT NULL DEFAULT now()
);

CREATE INDEX sales_product ON sales (product_id);

COMMENT ON TABLE sales IS 'Offers of a product. What is said here is what the next round will be made from; what a running round obeys stands in rounds.';
COMMENT ON COLUMN sales.id IS 'The name in the API. Derived from the operator and the key when the creation had one, so that it happens once.';
COMMENT ON COLUMN sales.number IS 'The short name: in Redis'' keys, and in the first four bytes of the id of each of its orders.';
COMMENT ON COLUMN sales.partition IS 'The Redis hash tag that all its rounds live under. Stored once, never computed from a count of partitions.';
COMMENT ON COLUMN sales.price_amount IS 'Minor units (cents).';
COMMENT ON COLUMN sales.allocation IS 'Units that a new round starts with.';
COMMENT ON COLUMN sales.opens_at IS 'First instant of selling, by Redis'' clock.';
COMMENT ON COLUMN sales.closes_at IS 'First instant after selling; null sells until sold out or closed.';
COMMENT ON COLUMN sales.round IS 'The current round.';
COMMENT ON COLUMN sales.version IS 'Counts changes of this row; the ETag.';
COMMENT ON COLUMN sales.created_by IS 'The operator; no foreign key, because users may live in another identity provider.';
COMMENT ON COLUMN sales.request_fingerprint IS 'What its creation asked for: the same key with another request is a mismatch.';

CREATE TABLE rounds (
    sale               integer NOT NULL REFERENCES sales (number),
    round              integer NOT NULL CHECK (round >= 1),
    unit_price         bigint NOT NULL CHECK (unit_price BETWEEN 0 AND 100000000000000),
    currency           text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    initial_allocation bigint NOT NULL CHECK (initial_allocation BETWEEN 1 AND 10000000),
    per_buyer_limit    bigint NOT NULL CHECK (per_buyer_limit BETWEEN 1 AND 1000000),
    per_order_limit    bigint NOT NULL CHECK (per_order_limit BETWEEN 1 AND per_buyer_limit),
    opens_at           timestamptz(3) NOT NULL,
    closes_at          timestamptz(3) CHECK (closes_at > opens_at),
    provisioned_at     timestamptz(3),
    intent             text NOT NULL DEFAULT 'live' CHECK (intent IN ('live', 'paused', 'closed')),
    allocation         bigint NOT NULL CHECK (allocation BETWEEN 0 AND 10000000),
    remaining          bigint NOT NULL CHECK (remaining >= 0),
    held               bigint NOT NULL DEFAULT 0 CHECK (held >= 0),
    sold               bigint NOT NULL DEFAULT 0 CHECK (sold >= 0),
    seq                bigint NOT NULL DEFAULT 0 CHECK (seq >= 0),
    epoch              integer NOT NULL DEFAULT 0 CHECK (epoch >= 0),
    pseq               bigint NOT NULL DEFAULT 0 CHECK (pseq >= 0),
    PRIMARY KEY (sale, round),
    CONSTRAINT rounds_conserve_units CHECK (remaining + held + sold = allocation)
) WITH (fillfactor = 50);

COMMENT ON TABLE rounds IS 'The runnings of a sale: their rules, fixed when they are made, and where their units are as of the position. Half of each page stays free, so that the writer''s updates touch no index.';
COMMENT ON COLUMN rounds.initial_allocation IS 'Units that it started with.';
COMMENT ON COLUMN rounds.provisioned_at IS 'When Redis confirmed that it has the round. Nothing is accepted for a round before this is set; a round with it is never created in Redis a second time.';
COMMENT ON COLUMN rounds.intent IS 'What the operator wants. Scheduled, open and past are derived from window and clock, never stored.';
COMMENT ON COLUMN rounds.allocation IS 'Units given so far, restocks included, as of (epoch, pseq).';
COMMENT ON COLUMN rounds.remaining IS 'Units to be had.';
COMMENT ON COLUMN rounds.held IS 'Units of orders that wait for their payment.';
COMMENT ON COLUMN rounds.sold IS 'Units of confirmed orders, dead letters included.';
COMMENT ON COLUMN rounds.seq IS 'The number of its last event.';
COMMENT ON COLUMN rounds.epoch IS 'The timeline of the journal entry that brought these counters.';
COMMENT ON COLUMN rounds.pseq IS 'The number of the journal entry that brought these counters; 0 before its first.';

CREATE TABLE orders (
    id           uuid PRIMARY KEY,
    sale_id      uuid NOT NULL,
    buyer_id     uuid NOT NULL,
    seq          bigint NOT NULL CHECK (seq >= 1),
    pseq         bigint NOT NULL CHECK (pseq >= 1),
    last_seq     bigint NOT NULL CHECK (last_seq >= seq),
    quantity     bigint NOT NULL CHECK (quantity BETWEEN 1 AND 1000000),
    unit_price   bigint NOT NULL CHECK (unit_price BETWEEN 0 AND 100000000000000),
    accepted_at  timestamptz(3) NOT NULL,
    updated_at   timestamptz(3) NOT NULL,
    sale         integer NOT NULL CHECK (sale >= 0),
    round        integer NOT NULL CHECK (round >= 1),
    epoch        integer NOT NULL CHECK (epoch >= 0),
    body_version smallint NOT NULL DEFAULT 1 CHECK (body_version >= 1),
    currency     text NOT NULL CHECK (octet_length(currency) = 3),
    status       text NOT NULL CHECK (status IN ('held', 'confirmed', 'expired', 'cancelled', 'refunded')),
    accepted_as  text NOT NULL CHECK (accepted_as IN ('held', 'confirmed')),
    durability   text NOT NULL CHECK (durability IN ('fast', 'fsync')),
    fingerprint  bytea NOT NULL CHECK (octet_length(fingerprint) = 8),
    UNIQUE (sale, round, epoch, seq)
) WITH (fillfactor = 90);

CREATE INDEX orders_buyer ON orders (buyer_id, accepted_at DESC, id DESC);

COMMENT ON TABLE orders IS 'Accepted purchases. No foreign key to rounds: the writer updates the round in the same transaction and notices a missing one. None to users: buyers may come from another identity provider. A tenth of each page stays free for changes of status, which touch no index.';
COMMENT ON COLUMN orders.id IS 'Derived from sale, buyer and key; begins with the sale''s number.';
COMMENT ON COLUMN orders.seq IS 'Its place among the events of its round. Leaderboard and audit read in order of (epoch, seq).';
COMMENT ON COLUMN orders.pseq IS 'The journal entry that carried it.';
COMMENT ON COLUMN orders.last_seq IS 'The event that gave it its present status; a later event may change it, an earlier one may not.';
COMMENT ON COLUMN orders.unit_price IS 'Minor units (cents) for one unit, at acceptance.';
COMMENT ON COLUMN orders.accepted_at IS 'By Redis'' clock, to the millisecond.';
COMMENT ON COLUMN orders.updated_at IS 'When the event of last_seq happened, by Redis'' clock.';
COMMENT ON COLUMN orders.sale IS 'The number of the sale: short, so it stands in the index.';
COMMENT ON COLUMN orders.sale_id IS 'The same sale by the name that the API knows, for people who ask with SQL.';
COMMENT ON COLUMN orders.epoch IS 'The timeline that accepted it.';
COMMENT ON COLUMN orders.body_version IS 'Which form its 201 had, so that a replay has the same bytes for ever.';
COMMENT ON COLUMN orders.accepted_as IS 'Its status at acceptance, which its 201 says.';
COMMENT ON COLUMN orders.durability IS 'What its acceptance survives.';
COMMENT ON COLUMN orders.fingerprint IS 'What the request asked for.';

CREATE TABLE round_events (
    sale         integer NOT NULL CHECK (sale >= 0),
    round        integer NOT NULL CHECK (round >= 1),
    epoch        integer NOT NULL CHECK (epoch >= 0),
    seq          bigint NOT NULL CHECK (seq >= 0),
    pseq         bigint NOT NULL CHECK (pseq >= 1),
    units        bigint NOT NULL CHECK (units >= 0),
    at           timestamptz(3) NOT NULL,
    order_id     uuid,
    actor        uuid,
    operation_id uuid,
    kind         text NOT NULL CHECK (kind IN ('provision', 'cancel', 'restock', 'pause', 'resume', 'close')),
    PRIMARY KEY (sale, round, epoch, seq),
    CONSTRAINT round_events_number_all_but_provision CHECK ((seq = 0) = (kind = 'provision')),
    CONSTRAINT round_events_cancel_an_order CHECK ((order_id IS NOT NULL) = (kind = 'cancel'))
);

COMMENT ON TABLE round_events IS 'Everything that happened to a round and is not an acceptance. Together with orders and dead_letters it has each seq from 1 on exactly once.';
COMMENT ON COLUMN round_events.seq IS '0 for the provisioning, which takes no number.';
COMMENT ON COLUMN round_events.units IS 'Units that it moved.';
COMMENT ON COLUMN round_events.actor IS 'The user who asked for it.';
COMMENT ON COLUMN round_events.operation_id IS 'The operation that it carried out, if the request had a key.';

CREATE TABLE journal_positions (
    partition       smallint PRIMARY KEY CHECK (partition >= 0),
    epoch           integer NOT NULL DEFAULT 0 CHECK (epoch >= 0),
    installed_epoch integer NOT NULL DEFAULT 0 CHECK (installed_epoch BETWEEN 0 AND epoch),
    position        bigint NOT NULL DEFAULT 0 CHECK (position >= 0),
    position_epoch  integer NOT NULL DEFAULT 0 CHECK (position_epoch BETWEEN 0 AND epoch),
    updated_at      timestamptz(3) NOT NULL DEFAULT now()
) WITH (fillfactor = 10);

COMMENT ON TABLE journal_positions IS 'Up to where PostgreSQL has the journal of each partition, and in which epoch Redis must be. Almost the whole page stays free: the row changes with every batch.';
COMMENT ON COLUMN journal_positions.epoch IS 'The fence. Raised under the row''s lock before anything is rebuilt; a writer that finds another epoch here than it learnt drops its batch.';
COMMENT ON COLUMN journal_positions.installed_epoch IS 'The last epoch that was seen written into Redis.';
COMMENT ON COLUMN journal_positions.position IS 'The number (pseq) of the last stored journal entry.';
COMMENT ON COLUMN journal_positions.position_epoch IS 'The epoch of the last stored journal entry.';

CREATE TABLE dead_letters (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    partition   smallint NOT NULL CHECK (partition >= 0),
    epoch       integer NOT NULL CHECK (epoch >= 0),
    pseq        bigint NOT NULL CHECK (pseq >= 1),
    sale        integer NOT NULL CHECK (sale >= 0),
    round       integer NOT NULL CHECK (round >= 1),
    seq_from    bigint NOT NULL CHECK (seq_from >= 0),
    seq_to      bigint NOT NULL,
    units       bigint NOT NULL,
    allocated   bigint NOT NULL DEFAULT 0,
    order_id    uuid,
    sqlstate    text,
    reason      text NOT NULL,
    payload     bytea NOT NULL,
    created_at  timestamptz(3) NOT NULL DEFAULT now(),
    resolved_at timestamptz(3) CHECK (resolved_at >= created_at),
    CONSTRAINT dead_letters_span CHECK (seq_to >= seq_from - 1)
);

CREATE INDEX dead_letters_round ON dead_letters (sale, round) WHERE resolved_at IS NULL;
CREATE INDEX dead_letters_order ON dead_letters (order_id) WHERE resolved_at IS NULL;
CREATE INDEX dead_letters_entry ON dead_letters (partition, pseq);

COMMENT ON TABLE dead_letters IS 'What the journal had and no table would take. Until one is resolved, its units are counted as the round''s counters count them, so that nothing is sold twice.';
COMMENT ON COLUMN dead_letters.seq_from IS 'The first event of the round that it stands for.';
COMMENT ON COLUMN dead_letters.seq_to IS 'The last; seq_from - 1 when it stands for none.';
COMMENT ON COLUMN dead_letters.units IS 'What it adds to the round''s sold units; negative when it gave some back.';
COMMENT ON COLUMN dead_letters.allocated IS 'What it adds to the round''s allocation.';
COMMENT ON COLUMN dead_letters.order_id IS 'The order, where one order alone was refused; everything later of the same order follows it here. Null when a whole entry could not be read.';
COMMENT ON COLUMN dead_letters.sqlstate IS 'What PostgreSQL said; null when the entry could not be read at all.';
COMMENT ON COLUMN dead_letters.payload IS 'The journal entry as it stood in Redis.';
