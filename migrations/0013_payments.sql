-- Payments: what was asked of a gateway, what it has, and what is left to do.
--
-- A row is there before the gateway hears anything, and each step is taken from the row alone, so
-- that a node that dies leaves nothing that another could not go on with.

ALTER TABLE sales DROP CONSTRAINT IF EXISTS sales_payment_check;
ALTER TABLE sales ADD CONSTRAINT sales_payment_check
    CHECK (payment IN ('none', 'sandbox', 'stripe', 'paypal'));
ALTER TABLE sales ADD COLUMN IF NOT EXISTS refund_returns_units boolean NOT NULL DEFAULT true;

COMMENT ON COLUMN sales.payment IS 'Who takes the money; none confirms held orders without any.';
COMMENT ON COLUMN sales.refund_returns_units IS 'Whether the units of a refunded order are for sale again.';

CREATE TABLE payments (
    id          uuid PRIMARY KEY,
    gateway     text NOT NULL CHECK (gateway IN ('sandbox', 'stripe', 'paypal')),
    state       text NOT NULL CHECK (state IN ('created', 'requires_action', 'pending', 'authorised',
                    'capturing', 'captured', 'releasing', 'revoking', 'voided', 'declined', 'refunded')),
    buyer_id    uuid NOT NULL,
    method      text NOT NULL CHECK (char_length(method) BETWEEN 1 AND 255),
    fingerprint bytea NOT NULL CHECK (octet_length(fingerprint) = 8),
    amount      bigint NOT NULL CHECK (amount BETWEEN 1 AND 100000000000000),
    currency    text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    opened      boolean NOT NULL DEFAULT false,
    again       boolean NOT NULL DEFAULT false,
    to_capture  bigint NOT NULL DEFAULT 0 CHECK (to_capture BETWEEN 0 AND amount),
    captured    bigint NOT NULL DEFAULT 0 CHECK (captured >= 0),
    refunded    bigint NOT NULL DEFAULT 0 CHECK (refunded >= 0),
    refund_due  bigint NOT NULL DEFAULT 0 CHECK (refund_due >= 0),
    reference   text CHECK (char_length(reference) BETWEEN 1 AND 255),
    action      jsonb,
    decline     text,
    trouble     text,
    tries       integer NOT NULL DEFAULT 0 CHECK (tries >= 0),
    troubles    integer NOT NULL DEFAULT 0 CHECK (troubles >= 0),
    version     bigint NOT NULL DEFAULT 1 CHECK (version >= 1),
    due_at      timestamptz(3),
    created_at  timestamptz(3) NOT NULL DEFAULT now(),
    updated_at  timestamptz(3) NOT NULL DEFAULT now(),
    CONSTRAINT payments_give_back_what_was_taken CHECK (refunded + refund_due <= captured),
    CONSTRAINT payments_opened_have_a_name CHECK (opened = (reference IS NOT NULL)),
    CONSTRAINT payments_took CHECK (state NOT IN ('captured', 'refunded') OR captured > 0),
    CONSTRAINT payments_took_nothing CHECK (state NOT IN ('voided', 'declined') OR captured = 0),
    CONSTRAINT payments_due CHECK (due_at IS NOT NULL
        OR state IN ('captured', 'voided', 'declined', 'refunded') AND refund_due = 0)
);

CREATE UNIQUE INDEX payments_reference ON payments (gateway, reference);
CREATE INDEX payments_due ON payments (due_at) WHERE due_at IS NOT NULL;

COMMENT ON TABLE payments IS 'Attempts to pay for orders, one row each. src/domain/payment.rs is the state machine.';
COMMENT ON COLUMN payments.id IS 'Derived from what is paid for, the buyer and the key: a retry finds its row.';
COMMENT ON COLUMN payments.state IS 'How far it has come.';
COMMENT ON COLUMN payments.method IS 'The gateway''s token of what the buyer pays with; never a card''s number.';
COMMENT ON COLUMN payments.fingerprint IS 'What the request asked for: the same key with another request is a mismatch.';
COMMENT ON COLUMN payments.amount IS 'What the buyer is asked for, minor units.';
COMMENT ON COLUMN payments.opened IS 'Whether the gateway knows of it.';
COMMENT ON COLUMN payments.again IS 'Whether its orders are those that were bought again, because the first had expired when the money came.';
COMMENT ON COLUMN payments.to_capture IS 'What its confirmed orders are worth.';
COMMENT ON COLUMN payments.captured IS 'What the gateway has taken.';
COMMENT ON COLUMN payments.refunded IS 'What it has given back.';
COMMENT ON COLUMN payments.refund_due IS 'What it has still to give back: the sum of refunds in state due.';
COMMENT ON COLUMN payments.reference IS 'The gateway''s name of it.';
COMMENT ON COLUMN payments.action IS 'What the buyer has to do.';
COMMENT ON COLUMN payments.decline IS 'Why the bank said no.';
COMMENT ON COLUMN payments.trouble IS 'What went wrong last; null since it went well.';
COMMENT ON COLUMN payments.tries IS 'How often the gateway has said that it did not do what it was asked for: each try has an idempotency key of its own, a lost answer has not.';
COMMENT ON COLUMN payments.troubles IS 'Troubles in a row: the pause grows with them.';
COMMENT ON COLUMN payments.version IS 'Counts changes; whoever has read an older one changes nothing.';
COMMENT ON COLUMN payments.due_at IS 'When somebody shall look at it next. Whoever does sets it ahead, so that it is one at a time.';

-- No hand and no bug moves a payment where none can go.
CREATE FUNCTION payments_go_forward() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.state = NEW.state OR (OLD.state || ' ' || NEW.state) IN (
        'created requires_action', 'created pending', 'created authorised', 'created voided',
        'created declined', 'created releasing',
        'requires_action created', 'requires_action pending', 'requires_action authorised',
        'requires_action voided', 'requires_action declined', 'requires_action releasing',
        'pending created', 'pending requires_action', 'pending authorised', 'pending voided',
        'pending declined', 'pending releasing',
        'authorised capturing', 'authorised captured', 'authorised releasing',
        'capturing captured', 'capturing revoking',
        'releasing voided', 'releasing authorised', 'releasing captured',
        'revoking voided', 'revoking captured',
        'voided releasing', 'declined releasing', 'captured refunded'
    ) THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'payment % cannot go from % to %', OLD.id, OLD.state, NEW.state
        USING ERRCODE = 'check_violation', CONSTRAINT = 'payments_go_forward';
END
$$;

CREATE TRIGGER payments_go_forward BEFORE UPDATE ON payments
    FOR EACH ROW EXECUTE FUNCTION payments_go_forward();

CREATE TABLE payment_orders (
    payment_id uuid NOT NULL REFERENCES payments (id),
    order_id   uuid NOT NULL,
    sale       integer NOT NULL CHECK (sale >= 0),
    round      integer NOT NULL CHECK (round >= 1),
    quantity   bigint NOT NULL CHECK (quantity >= 1),
    amount     bigint NOT NULL CHECK (amount >= 0),
    fate       text NOT NULL DEFAULT 'asked' CHECK (fate IN ('asked', 'confirmed', 'gone', 'replaced')),
    live       boolean NOT NULL DEFAULT true,
    PRIMARY KEY (payment_id, order_id)
);

CREATE UNIQUE INDEX payment_orders_live ON payment_orders (order_id) WHERE live;
CREATE INDEX payment_orders_order ON payment_orders (order_id);
CREATE INDEX payment_orders_round ON payment_orders (sale, round);

COMMENT ON TABLE payment_orders IS 'What a payment pays for: one order, or several of one checkout.';
COMMENT ON COLUMN payment_orders.amount IS 'What the order is worth, minor units.';
COMMENT ON COLUMN payment_orders.fate IS 'asked: to be confirmed. confirmed: bought. gone: it had expired or was cancelled. replaced: its units were bought again as another order.';
COMMENT ON COLUMN payment_orders.live IS 'Whether this payment may still confirm the order, or has: at most one does.';

CREATE TABLE refunds (
    id           uuid PRIMARY KEY,
    payment_id   uuid NOT NULL REFERENCES payments (id),
    order_id     uuid,
    cause        text NOT NULL CHECK (cause IN ('refund', 'cancel', 'late', 'surplus')),
    state        text NOT NULL CHECK (state IN ('asked', 'due', 'done', 'refused')),
    quantity     bigint CHECK (quantity >= 1),
    whole        boolean NOT NULL,
    amount       bigint NOT NULL CHECK (amount >= 0),
    reason       text CHECK (char_length(reason) BETWEEN 1 AND 1000),
    units_return boolean NOT NULL,
    actor        uuid,
    fingerprint  bytea NOT NULL CHECK (octet_length(fingerprint) = 8),
    tries        integer NOT NULL DEFAULT 0 CHECK (tries >= 0),
    created_at   timestamptz(3) NOT NULL DEFAULT now(),
    done_at      timestamptz(3)
);

CREATE INDEX refunds_payment ON refunds (payment_id, created_at);
CREATE INDEX refunds_order ON refunds (order_id, created_at);

COMMENT ON TABLE refunds IS 'Money that goes back, all or some of a payment.';
COMMENT ON COLUMN refunds.id IS 'Derived from the operator''s key, or from the payment and the cause: it happens once.';
COMMENT ON COLUMN refunds.order_id IS 'Whose units; null when no order is concerned.';
COMMENT ON COLUMN refunds.cause IS 'refund: an operator. cancel: the order was given back. late: it had expired when the money came. surplus: more was taken than asked for.';
COMMENT ON COLUMN refunds.state IS 'asked: the units are to go back first. due: the money is to go back. done: it did. refused: there was nothing to give back.';
COMMENT ON COLUMN refunds.quantity IS 'Units, once it is known.';
COMMENT ON COLUMN refunds.whole IS 'Whether all that was left was asked for.';
COMMENT ON COLUMN refunds.tries IS 'As in payments.';

CREATE TABLE gateway_events (
    gateway     text NOT NULL CHECK (gateway IN ('sandbox', 'stripe', 'paypal')),
    event       text NOT NULL CHECK (char_length(event) BETWEEN 1 AND 255),
    kind        text NOT NULL,
    reference   text,
    payment_id  uuid REFERENCES payments (id),
    received_at timestamptz(3) NOT NULL DEFAULT now(),
    PRIMARY KEY (gateway, event)
);

CREATE INDEX gateway_events_received ON gateway_events (received_at);

COMMENT ON TABLE gateway_events IS 'Webhooks that were verified, each once. What they say is not believed: they only make their payment due.';
COMMENT ON COLUMN gateway_events.payment_id IS 'Null when it is about no payment of ours.';
