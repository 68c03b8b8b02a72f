-- Sales that open again: their schedule, how far it has been carried out, and what was missed.

ALTER TABLE sales
    ADD COLUMN schedule        jsonb,
    ADD COLUMN planned_until   timestamptz(3),
    ADD COLUMN windows_planned integer CHECK (windows_planned >= 1),
    ADD COLUMN plan_at         timestamptz(3),
    ADD CONSTRAINT sales_schedule_has_progress
        CHECK ((schedule IS NULL) = (planned_until IS NULL)
               AND (schedule IS NULL) = (windows_planned IS NULL)
               AND (schedule IS NOT NULL OR plan_at IS NULL));

CREATE INDEX sales_plan ON sales (plan_at) WHERE plan_at IS NOT NULL;

COMMENT ON COLUMN sales.schedule IS 'When its rounds open: a recurring time ({cron, time_zone, duration_seconds, …}) or windows ([opens, closes] in milliseconds); null opens once.';
COMMENT ON COLUMN sales.planned_until IS 'The schedule''s cursor: each window that opens up to this instant is a round or was missed. Moved under the row''s lock, so that one window becomes one round however many nodes look.';
COMMENT ON COLUMN sales.windows_planned IS 'Windows that the cursor has passed, missed ones included.';
COMMENT ON COLUMN sales.plan_at IS 'When something is to be done next; null when the schedule is over.';
COMMENT ON COLUMN sales.round IS 'A round before which all are over: where to look for the current one. The current one itself follows from the clock (current_round).';

ALTER TABLE rounds ADD COLUMN opened_at timestamptz(3);

CREATE UNIQUE INDEX rounds_window ON rounds (sale, opens_at) WHERE closes_at IS NOT NULL;
CREATE INDEX rounds_unprovisioned ON rounds (sale, round) WHERE provisioned_at IS NULL;

COMMENT ON COLUMN rounds.opened_at IS 'When a node first saw it inside its window; only rounds of sales with a schedule have one. A round whose window has passed without, and in which nothing happened, was missed.';
COMMENT ON INDEX rounds_window IS 'A window becomes a round once; a window of a schedule always has an end.';

CREATE TABLE missed_windows (
    sale       integer NOT NULL REFERENCES sales (number),
    opens_at   timestamptz(3) NOT NULL,
    closes_at  timestamptz(3) NOT NULL CHECK (closes_at > opens_at),
    noticed_at timestamptz(3) NOT NULL,
    PRIMARY KEY (sale, opens_at),
    CONSTRAINT missed_windows_had_passed CHECK (noticed_at >= closes_at)
);

COMMENT ON TABLE missed_windows IS 'Windows of a schedule that passed before they had a round: nothing was running. They are not run late.';
COMMENT ON COLUMN missed_windows.noticed_at IS 'When it was noticed, by Redis'' clock.';

-- The round that a sale is in at an instant: the first that is not over; after the last, that one.
-- Asks no row of the table when all is over but those from from_round on.
CREATE FUNCTION current_round(sale_number integer, from_round integer, instant timestamptz)
RETURNS integer LANGUAGE sql STABLE
RETURN (
    SELECT rounds.round FROM rounds
    CROSS JOIN LATERAL (
        SELECT rounds.intent IN ('closed', 'settled', 'archived')
               OR coalesce(rounds.closes_at <= instant, false) AS ended
    ) AS past
    WHERE rounds.sale = sale_number AND rounds.round >= from_round
      AND rounds.provisioned_at IS NOT NULL
    ORDER BY past.ended, CASE WHEN past.ended THEN -rounds.round ELSE rounds.round END
    LIMIT 1
);

COMMENT ON FUNCTION current_round IS 'The round that a sale is in at an instant, as far as PostgreSQL knows: the first one that is not over, else the last one. Null before one is provisioned.';
