-- The sandbox: what a bank would have in its own books, so that a restart loses none of it.

CREATE TABLE sandbox_charges (
    reference  text PRIMARY KEY,
    payment_id uuid NOT NULL UNIQUE,
    amount     bigint NOT NULL CHECK (amount >= 1),
    currency   text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    state      text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'requires_action', 'pending',
                   'authorised', 'captured', 'voided', 'declined')),
    method     text,
    decline    text,
    captured   bigint NOT NULL DEFAULT 0 CHECK (captured BETWEEN 0 AND amount),
    lost       boolean NOT NULL DEFAULT false,
    ripe_at    timestamptz(3),
    created_at timestamptz(3) NOT NULL DEFAULT now(),
    CONSTRAINT sandbox_charges_took CHECK ((state = 'captured') = (captured > 0))
);

COMMENT ON TABLE sandbox_charges IS 'Toy money: payments as the sandbox has them.';
COMMENT ON COLUMN sandbox_charges.method IS 'The magic word that it was paid with.';
COMMENT ON COLUMN sandbox_charges.lost IS 'Whether an answer about it has been lost on purpose already.';
COMMENT ON COLUMN sandbox_charges.ripe_at IS 'When a pending one is decided.';

CREATE TABLE sandbox_refunds (
    key        text PRIMARY KEY,
    reference  text NOT NULL REFERENCES sandbox_charges (reference),
    amount     bigint NOT NULL CHECK (amount >= 1),
    created_at timestamptz(3) NOT NULL DEFAULT now()
);

CREATE INDEX sandbox_refunds_reference ON sandbox_refunds (reference);

COMMENT ON TABLE sandbox_refunds IS 'Toy money that went back, once for each idempotency key.';

CREATE TABLE sandbox_notices (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event     uuid NOT NULL,
    reference text NOT NULL,
    kind      text NOT NULL,
    due_at    timestamptz(3) NOT NULL
);

CREATE INDEX sandbox_notices_due ON sandbox_notices (due_at);

COMMENT ON TABLE sandbox_notices IS 'Webhooks that the sandbox has still to send; the same event may be there several times.';
