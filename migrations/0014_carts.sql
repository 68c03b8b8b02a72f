-- Carts, and what became of each attempt to buy one.

CREATE TABLE carts (
    buyer_id   uuid PRIMARY KEY,
    lines      jsonb NOT NULL CHECK (jsonb_typeof(lines) = 'array' AND jsonb_array_length(lines) <= 16),
    version    bigint NOT NULL DEFAULT 1 CHECK (version >= 1),
    updated_at timestamptz(3) NOT NULL DEFAULT now()
);

COMMENT ON TABLE carts IS 'What each buyer means to buy. It holds nothing: only a checkout does.';
COMMENT ON COLUMN carts.lines IS 'Sales and quantities, each sale once, in the order in which the buyer put them.';
COMMENT ON COLUMN carts.version IS 'Counts changes; the ETag.';

CREATE TABLE checkouts (
    id           uuid PRIMARY KEY,
    buyer_id     uuid NOT NULL,
    state        text NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'accepted', 'failed')),
    lines        jsonb NOT NULL CHECK (jsonb_typeof(lines) = 'array'),
    reasons      jsonb CHECK ((reasons IS NOT NULL) = (state = 'failed')),
    cart_version bigint NOT NULL,
    leased_until timestamptz(3) NOT NULL,
    created_at   timestamptz(3) NOT NULL DEFAULT now(),
    updated_at   timestamptz(3) NOT NULL DEFAULT now()
);

CREATE INDEX checkouts_pending ON checkouts (leased_until) WHERE state = 'pending';

COMMENT ON TABLE checkouts IS 'Carts that were bought, or are being bought. The row is there before the first order, so that a node that dies in between leaves nothing half-done: whoever finds it pending finishes it.';
COMMENT ON COLUMN checkouts.id IS 'Derived from buyer and key, so that a retry finds it.';
COMMENT ON COLUMN checkouts.state IS 'pending: orders may be there. accepted: all of them are. failed: some were, and were withdrawn.';
COMMENT ON COLUMN checkouts.lines IS 'Sale, quantity and id of the order of each line.';
COMMENT ON COLUMN checkouts.reasons IS 'Why it failed, line by line; the key replays it.';
COMMENT ON COLUMN checkouts.cart_version IS 'The cart that it bought: that one is cleared when it succeeds.';
COMMENT ON COLUMN checkouts.leased_until IS 'Until when somebody works on it.';
