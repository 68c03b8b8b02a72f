-- Sales change while they run: what their next rounds are made from, and who said so.

ALTER TABLE sales
    ADD COLUMN updated_by uuid,
    DROP CONSTRAINT sales_windows_planned_check,
    ADD CONSTRAINT sales_windows_planned_check CHECK (windows_planned >= 0);

COMMENT ON COLUMN sales.updated_by IS 'The operator who changed it last; null if nobody has. What happens to a round names its actor in round_events.';

-- Windows of rounds change, one after the other, and two may swap within a batch of the writer. That a
-- window becomes a round once follows from the cursor of its schedule, under the lock of the sale's row.
DROP INDEX rounds_window;

CREATE INDEX sales_updated ON sales (updated_at);
COMMENT ON COLUMN sales.updated_at IS 'When it was last changed, by PostgreSQL''s clock: nodes look for what has changed since they looked.';
