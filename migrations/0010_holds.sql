-- Holds, and everything that comes with them: orders that wait for their payment, units that go back
-- in part, a line of buyers, limits over all rounds of a sale, rules that change.

ALTER TABLE sales
    ADD COLUMN hold_ms bigint CHECK (hold_ms BETWEEN 1000 AND 86400000),
    ADD COLUMN limit_scope text NOT NULL DEFAULT 'round' CHECK (limit_scope IN ('round', 'sale')),
    ADD COLUMN ends text NOT NULL DEFAULT 'time' CHECK (ends IN ('time', 'sold_out')),
    ADD COLUMN waitlist boolean NOT NULL DEFAULT false,
    ADD CONSTRAINT sales_pay_within_a_hold CHECK (payment = 'none' OR hold_ms IS NOT NULL),
    ADD CONSTRAINT sales_line_waits_for_holds CHECK (NOT waitlist OR hold_ms IS NOT NULL);

COMMENT ON COLUMN sales.hold_ms IS 'How long an order of a new round may wait for its payment; null confirms at once.';
COMMENT ON COLUMN sales.limit_scope IS 'What the limit per buyer counts over: each round, or all of them. Never changes.';
COMMENT ON COLUMN sales.ends IS 'sold_out: a round closes once nothing remains and nothing is held.';
COMMENT ON COLUMN sales.waitlist IS 'Whether buyers may wait in line for units that come back.';

ALTER TABLE rounds
    ADD COLUMN hold_ms bigint CHECK (hold_ms BETWEEN 1000 AND 86400000),
    ADD COLUMN limit_scope text NOT NULL DEFAULT 'round' CHECK (limit_scope IN ('round', 'sale')),
    ADD COLUMN ends text NOT NULL DEFAULT 'time' CHECK (ends IN ('time', 'sold_out')),
    ADD COLUMN waitlist boolean NOT NULL DEFAULT false;

COMMENT ON COLUMN rounds.hold_ms IS 'How long its orders may wait for their payment; null confirms at once.';
COMMENT ON COLUMN rounds.limit_scope IS 'What the limit per buyer counts over; that of its sale.';
COMMENT ON COLUMN rounds.ends IS 'sold_out: it closes once nothing remains and nothing is held.';
COMMENT ON COLUMN rounds.waitlist IS 'Whether buyers may wait in line for units that come back.';

CREATE INDEX rounds_with_holds ON rounds (sale, round)
    WHERE hold_ms IS NOT NULL AND intent IN ('live', 'paused', 'closed');

ALTER TABLE orders
    ADD COLUMN hold_ms bigint NOT NULL DEFAULT 0 CHECK (hold_ms BETWEEN 0 AND 86400000),
    ADD COLUMN extended_ms bigint NOT NULL DEFAULT 0 CHECK (extended_ms >= 0),
    ADD COLUMN returned bigint NOT NULL DEFAULT 0 CHECK (returned >= 0),
    ADD COLUMN refunded bigint NOT NULL DEFAULT 0 CHECK (refunded >= 0),
    DROP CONSTRAINT orders_status_check,
    ADD CONSTRAINT orders_status_check
        CHECK (status IN ('held', 'confirmed', 'expired', 'cancelled', 'refunded', 'withdrawn'));

UPDATE orders SET returned = quantity WHERE status = 'cancelled';

-- A final order has nothing left, an open one has something.
ALTER TABLE orders
    ADD CONSTRAINT orders_end_when_nothing_is_left
        CHECK (CASE WHEN status IN ('held', 'confirmed') THEN returned + refunded < quantity
                    ELSE returned + refunded = quantity END),
    ADD CONSTRAINT orders_are_held_by_holds CHECK ((accepted_as = 'held') = (hold_ms > 0)),
    ADD CONSTRAINT orders_expire_from_holds
        CHECK (status NOT IN ('held', 'expired') OR accepted_as = 'held');

CREATE INDEX orders_held ON orders (sale, round) WHERE status = 'held';

COMMENT ON COLUMN orders.hold_ms IS 'How long it could wait for its payment when it was accepted; 0 if it was confirmed at once.';
COMMENT ON COLUMN orders.extended_ms IS 'By how much that was extended. Its deadline is accepted_at + hold_ms + extended_ms.';
COMMENT ON COLUMN orders.returned IS 'Units of it that went back on sale.';
COMMENT ON COLUMN orders.refunded IS 'Units of it that were refunded and stay sold.';

ALTER TABLE round_events
    DROP CONSTRAINT round_events_kind_check,
    ADD CONSTRAINT round_events_kind_check
        CHECK (kind IN ('provision', 'cancel', 'restock', 'pause', 'resume', 'close', 'settle',
                        'archive', 'confirm', 'expire', 'extend', 'withdraw', 'refund', 'return',
                        'reduce', 'amend', 'join', 'leave')),
    DROP CONSTRAINT round_events_cancel_an_order,
    ADD CONSTRAINT round_events_name_their_order
        CHECK ((order_id IS NOT NULL) = (kind IN ('cancel', 'confirm', 'expire', 'extend', 'withdraw',
                                                  'refund', 'return', 'join', 'leave'))),
    ADD COLUMN from_held boolean NOT NULL DEFAULT false,
    ADD COLUMN fingerprint bytea CHECK (octet_length(fingerprint) = 8),
    ADD COLUMN amendment jsonb,
    ADD CONSTRAINT round_events_say_what_they_amend CHECK ((amendment IS NOT NULL) = (kind = 'amend'));

CREATE INDEX round_events_line ON round_events (sale, round) WHERE kind IN ('join', 'leave');

COMMENT ON COLUMN round_events.units IS 'Units that it moved; of extend the milliseconds; of join the units waited for.';
COMMENT ON COLUMN round_events.order_id IS 'The order that it changed; of join and leave the id that the order would have.';
COMMENT ON COLUMN round_events.actor IS 'The user who asked for it; of join and leave the buyer.';
COMMENT ON COLUMN round_events.from_held IS 'Whether its units were held before it.';
COMMENT ON COLUMN round_events.fingerprint IS 'What the request asked for; null in restocks from before this was kept, which units tell.';
COMMENT ON COLUMN round_events.amendment IS 'The rules of the round after it.';

ALTER TABLE dead_letters ADD COLUMN held bigint NOT NULL DEFAULT 0;

COMMENT ON COLUMN dead_letters.held IS 'What it adds to the round''s held units; negative when it took some.';
