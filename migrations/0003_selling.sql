-- Sales, their rounds, and everything that the writer stores from the journal.
--
-- Redis decides and PostgreSQL remembers: below `rounds.provisioned_at`, every row here is a replay
-- of the journal, written in the transaction that moves `journal_positions`. The check constraints
-- repeat the invariants of the domain, so that no hand and no bug can store what may not be.

create table sales (
    id                  uuid primary key,
    number              integer generated always as identity (start with 1) unique,
    partition           smallint not null default 0 check (partition >= 0),
    product_id          uuid not null references products (id),
    name                text not null check (char_length(name) between 1 and 200),
    terms               text check (char_length(terms) between 1 and 10000),
    price_amount        bigint not null check (price_amount between 0 and 100000000000000),
    price_currency      text not null check (price_currency ~ '^[A-Z]{3}$'),
    allocation          bigint not null check (allocation between 1 and 10000000),
    per_buyer_limit     bigint not null check (per_buyer_limit between 1 and 1000000),
    per_order_limit     bigint not null check (per_order_limit between 1 and per_buyer_limit),
    opens_at            timestamptz(3) not null,
    closes_at           timestamptz(3) check (closes_at > opens_at),
    durability          text not null check (durability in ('default')),
    payment             text not null check (payment in ('none')),
    round               integer not null default 1 check (round >= 1),
    version             bigint not null default 1 check (version >= 1),
    created_by          uuid not null,
    request_fingerprint bytea not null check (octet_length(request_fingerprint) = 8),
    created_at          timestamptz(3) not null default now(),
    updated_at          timestamptz(3) not null default now()
);

create index sales_product on sales (product_id);

comment on table sales is 'Offers of a product. What is said here is what the next round will be made from; what a running round obeys stands in rounds.';
comment on column sales.id is 'The name in the API. Derived from the operator and the key when the creation had one, so that it happens once.';
comment on column sales.number is 'The short name: in Redis'' keys, and in the first four bytes of the id of each of its orders.';
comment on column sales.partition is 'The Redis hash tag that all its rounds live under. Stored once, never computed from a count of partitions.';
comment on column sales.price_amount is 'Minor units (cents).';
comment on column sales.allocation is 'Units that a new round starts with.';
comment on column sales.opens_at is 'First instant of selling, by Redis'' clock.';
comment on column sales.closes_at is 'First instant after selling; null sells until sold out or closed.';
comment on column sales.round is 'The current round.';
comment on column sales.version is 'Counts changes of this row; the ETag.';
comment on column sales.created_by is 'The operator; no foreign key, because users may live in another identity provider.';
comment on column sales.request_fingerprint is 'What its creation asked for: the same key with another request is a mismatch.';

create table rounds (
    sale               integer not null references sales (number),
    round              integer not null check (round >= 1),
    unit_price         bigint not null check (unit_price between 0 and 100000000000000),
    currency           text not null check (currency ~ '^[A-Z]{3}$'),
    initial_allocation bigint not null check (initial_allocation between 1 and 10000000),
    per_buyer_limit    bigint not null check (per_buyer_limit between 1 and 1000000),
    per_order_limit    bigint not null check (per_order_limit between 1 and per_buyer_limit),
    opens_at           timestamptz(3) not null,
    closes_at          timestamptz(3) check (closes_at > opens_at),
    provisioned_at     timestamptz(3),
    intent             text not null default 'live' check (intent in ('live', 'paused', 'closed')),
    allocation         bigint not null check (allocation between 0 and 10000000),
    remaining          bigint not null check (remaining >= 0),
    held               bigint not null default 0 check (held >= 0),
    sold               bigint not null default 0 check (sold >= 0),
    seq                bigint not null default 0 check (seq >= 0),
    epoch              integer not null default 0 check (epoch >= 0),
    pseq               bigint not null default 0 check (pseq >= 0),
    primary key (sale, round),
    constraint rounds_conserve_units check (remaining + held + sold = allocation)
) with (fillfactor = 50);

comment on table rounds is 'The runnings of a sale: their rules, fixed when they are made, and where their units are as of the position. Half of each page stays free, so that the writer''s updates touch no index.';
comment on column rounds.initial_allocation is 'Units that it started with.';
comment on column rounds.provisioned_at is 'When Redis confirmed that it has the round. Nothing is accepted for a round before this is set; a round with it is never created in Redis a second time.';
comment on column rounds.intent is 'What the operator wants. Scheduled, open and past are derived from window and clock, never stored.';
comment on column rounds.allocation is 'Units given so far, restocks included, as of (epoch, pseq).';
comment on column rounds.remaining is 'Units to be had.';
comment on column rounds.held is 'Units of orders that wait for their payment.';
comment on column rounds.sold is 'Units of confirmed orders, dead letters included.';
comment on column rounds.seq is 'The number of its last event.';
comment on column rounds.epoch is 'The timeline of the journal entry that brought these counters.';
comment on column rounds.pseq is 'The number of the journal entry that brought these counters; 0 before its first.';

create table orders (
    id           uuid primary key,
    buyer_id     uuid not null,
    seq          bigint not null check (seq >= 1),
    pseq         bigint not null check (pseq >= 1),
    last_seq     bigint not null check (last_seq >= seq),
    quantity     bigint not null check (quantity between 1 and 1000000),
    unit_price   bigint not null check (unit_price between 0 and 100000000000000),
    accepted_at  timestamptz(3) not null,
    updated_at   timestamptz(3) not null,
    sale         integer not null check (sale >= 0),
    round        integer not null check (round >= 1),
    epoch        integer not null check (epoch >= 0),
    body_version smallint not null default 1 check (body_version >= 1),
    currency     text not null check (octet_length(currency) = 3),
    status       text not null check (status in ('held', 'confirmed', 'expired', 'cancelled', 'refunded')),
    accepted_as  text not null check (accepted_as in ('held', 'confirmed')),
    durability   text not null check (durability in ('fast', 'fsync')),
    fingerprint  bytea not null check (octet_length(fingerprint) = 8),
    unique (sale, round, epoch, seq)
) with (fillfactor = 90);

create index orders_buyer on orders (buyer_id, accepted_at desc, id desc);

comment on table orders is 'Accepted purchases. No foreign key to rounds: the writer updates the round in the same transaction and notices a missing one. None to users: buyers may come from another identity provider. A tenth of each page stays free for changes of status, which touch no index.';
comment on column orders.id is 'Derived from sale, buyer and key; begins with the sale''s number.';
comment on column orders.seq is 'Its place among the events of its round. Leaderboard and audit read in order of (epoch, seq).';
comment on column orders.pseq is 'The journal entry that carried it.';
comment on column orders.last_seq is 'The event that gave it its present status; a later event may change it, an earlier one may not.';
comment on column orders.unit_price is 'Minor units (cents) for one unit, at acceptance.';
comment on column orders.accepted_at is 'By Redis'' clock, to the millisecond.';
comment on column orders.updated_at is 'When the event of last_seq happened, by Redis'' clock.';
comment on column orders.sale is 'The number of the sale.';
comment on column orders.epoch is 'The timeline that accepted it.';
comment on column orders.body_version is 'Which form its 201 had, so that a replay has the same bytes for ever.';
comment on column orders.accepted_as is 'Its status at acceptance, which its 201 says.';
comment on column orders.durability is 'What its acceptance survives.';
comment on column orders.fingerprint is 'What the request asked for.';

create table round_events (
    sale         integer not null check (sale >= 0),
    round        integer not null check (round >= 1),
    epoch        integer not null check (epoch >= 0),
    seq          bigint not null check (seq >= 0),
    pseq         bigint not null check (pseq >= 1),
    units        bigint not null check (units >= 0),
    at           timestamptz(3) not null,
    order_id     uuid,
    actor        uuid,
    operation_id uuid,
    kind         text not null check (kind in ('provision', 'cancel', 'restock', 'pause', 'resume', 'close')),
    primary key (sale, round, epoch, seq),
    constraint round_events_number_all_but_provision check ((seq = 0) = (kind = 'provision')),
    constraint round_events_cancel_an_order check ((order_id is not null) = (kind = 'cancel'))
);

comment on table round_events is 'Everything that happened to a round and is not an acceptance. Together with orders and dead_letters it has each seq from 1 on exactly once.';
comment on column round_events.seq is '0 for the provisioning, which takes no number.';
comment on column round_events.units is 'Units that it moved.';
comment on column round_events.actor is 'The user who asked for it.';
comment on column round_events.operation_id is 'The operation that it carried out, if the request had a key.';

create table journal_positions (
    partition       smallint primary key check (partition >= 0),
    epoch           integer not null default 0 check (epoch >= 0),
    installed_epoch integer not null default 0 check (installed_epoch between 0 and epoch),
    position        bigint not null default 0 check (position >= 0),
    position_epoch  integer not null default 0 check (position_epoch between 0 and epoch),
    updated_at      timestamptz(3) not null default now()
) with (fillfactor = 10);

comment on table journal_positions is 'Up to where PostgreSQL has the journal of each partition, and in which epoch Redis must be. Almost the whole page stays free: the row changes with every batch.';
comment on column journal_positions.epoch is 'The fence. Raised under the row''s lock before anything is rebuilt; a writer that finds another epoch here than it learnt drops its batch.';
comment on column journal_positions.installed_epoch is 'The last epoch that was seen written into Redis.';
comment on column journal_positions.position is 'The number (pseq) of the last stored journal entry.';
comment on column journal_positions.position_epoch is 'The epoch of the last stored journal entry.';

create table dead_letters (
    id          bigint generated always as identity primary key,
    partition   smallint not null check (partition >= 0),
    epoch       integer not null check (epoch >= 0),
    pseq        bigint not null check (pseq >= 1),
    sale        integer not null check (sale >= 0),
    round       integer not null check (round >= 1),
    seq_from    bigint not null check (seq_from >= 0),
    seq_to      bigint not null,
    units       bigint not null,
    allocated   bigint not null default 0,
    order_id    uuid,
    sqlstate    text,
    reason      text not null,
    payload     bytea not null,
    created_at  timestamptz(3) not null default now(),
    resolved_at timestamptz(3) check (resolved_at >= created_at),
    constraint dead_letters_span check (seq_to >= seq_from - 1)
);

create index dead_letters_round on dead_letters (sale, round) where resolved_at is null;
create index dead_letters_order on dead_letters (order_id) where resolved_at is null;
create index dead_letters_entry on dead_letters (partition, pseq);

comment on table dead_letters is 'What the journal had and no table would take. Until one is resolved, its units are counted as the round''s counters count them, so that nothing is sold twice.';
comment on column dead_letters.seq_from is 'The first event of the round that it stands for.';
comment on column dead_letters.seq_to is 'The last; seq_from - 1 when it stands for none.';
comment on column dead_letters.units is 'What it adds to the round''s sold units; negative when it gave some back.';
comment on column dead_letters.allocated is 'What it adds to the round''s allocation.';
comment on column dead_letters.order_id is 'The order, where one order alone was refused; everything later of the same order follows it here. Null when a whole entry could not be read.';
comment on column dead_letters.sqlstate is 'What PostgreSQL said; null when the entry could not be read at all.';
comment on column dead_letters.payload is 'The journal entry as it stood in Redis.';
