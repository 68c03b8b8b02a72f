-- Who did what, when and from where: added to and never changed, each row chained to the one before.

CREATE TABLE audit_log (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at          timestamptz(3) NOT NULL DEFAULT clock_timestamp(),
    action      text NOT NULL,
    actor       uuid,
    role        text,
    credential  uuid,
    client      text,
    request_id  text,
    target_kind text,
    target      text,
    outcome     text NOT NULL,
    times       bigint NOT NULL DEFAULT 1 CHECK (times >= 1),
    before      jsonb,
    after       jsonb,
    number      bigint UNIQUE CHECK (number >= 1),
    previous    bytea CHECK (octet_length(previous) = 32),
    hash        bytea CHECK (octet_length(hash) = 32),
    CONSTRAINT audit_log_chained CHECK (num_nulls(number, previous, hash) IN (0, 3))
);

CREATE INDEX audit_log_unchained ON audit_log (id) WHERE number IS NULL;
CREATE INDEX audit_log_actor ON audit_log (actor, id);
CREATE INDEX audit_log_target ON audit_log (target text_pattern_ops, id);
CREATE INDEX audit_log_request ON audit_log (request_id);

COMMENT ON TABLE audit_log IS 'What people did here. A request has a row of its own; what it changed has one for each changed row, written by triggers in the transaction of the change. No name, no address of a person, no secret.';
COMMENT ON COLUMN audit_log.action IS 'sales_pause: the operation of the OpenAPI document that was asked for. sales.update: a row of that table was changed. round.pause: a journal event, as it was stored.';
COMMENT ON COLUMN audit_log.actor IS 'The user; null when nobody was known.';
COMMENT ON COLUMN audit_log.role IS 'What the actor acted as: buyer, operator, admin; command for `stockade` on the command line; postgresql:<role> for a change by hand.';
COMMENT ON COLUMN audit_log.credential IS 'The session or the API key.';
COMMENT ON COLUMN audit_log.client IS 'The address of the client; a prefix where nobody was known.';
COMMENT ON COLUMN audit_log.request_id IS 'The X-Request-Id of the answer: the same in all rows of one request.';
COMMENT ON COLUMN audit_log.target_kind IS 'What was asked for or changed: a noun of the API or a table.';
COMMENT ON COLUMN audit_log.target IS 'Its id; of a round the sale''s and its number.';
COMMENT ON COLUMN audit_log.outcome IS 'done, the code of a problem, or abandoned: the client left before the answer.';
COMMENT ON COLUMN audit_log.times IS 'How often: what changes nothing is counted by the minute.';
COMMENT ON COLUMN audit_log.before IS 'What was there; of a change only what is different after it.';
COMMENT ON COLUMN audit_log.after IS 'What is there now.';
COMMENT ON COLUMN audit_log.number IS 'The place in the chain; null for the second until the row is chained.';
COMMENT ON COLUMN audit_log.previous IS 'The hash of the row before.';
COMMENT ON COLUMN audit_log.hash IS 'SHA-256 over previous, number and content.';

CREATE TABLE audit_log_head (
    one    boolean PRIMARY KEY DEFAULT true CHECK (one),
    number bigint NOT NULL DEFAULT 0 CHECK (number >= 0),
    hash   bytea NOT NULL DEFAULT '\x0000000000000000000000000000000000000000000000000000000000000000'
           CHECK (octet_length(hash) = 32)
);
INSERT INTO audit_log_head DEFAULT VALUES;

COMMENT ON TABLE audit_log_head IS 'The end of the chain: without it nobody would notice that the last rows are gone. Whoever chains rows holds its lock.';

-- Holds for everybody. Only the owner of the table can switch it off, which is a step of its own.
CREATE FUNCTION audit_log_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    chain CONSTANT text[] := ARRAY['number', 'previous', 'hash'];
BEGIN
    IF TG_OP = 'UPDATE' AND OLD.number IS NULL AND NEW.number IS NOT NULL
       AND to_jsonb(OLD) - chain = to_jsonb(NEW) - chain THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'the audit log is only added to' USING ERRCODE = 'insufficient_privilege';
END
$$;
CREATE TRIGGER audit_log_append_only BEFORE UPDATE OR DELETE ON audit_log
    FOR EACH ROW EXECUTE FUNCTION audit_log_append_only();
CREATE TRIGGER audit_log_not_emptied BEFORE TRUNCATE ON audit_log
    FOR EACH STATEMENT EXECUTE FUNCTION audit_log_append_only();
ALTER TABLE audit_log ENABLE ALWAYS TRIGGER audit_log_append_only;
ALTER TABLE audit_log ENABLE ALWAYS TRIGGER audit_log_not_emptied;

-- What people changed in a table. Arguments: the column with the id, then those that are left out.
-- What the server does by itself has its own records and none here: it says for whom it acts, or
-- nothing. Whoever is not the server is written down as who he is to PostgreSQL.
CREATE FUNCTION audit_change() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    origin jsonb := nullif(current_setting('stockade.origin', true), '')::jsonb;
    old_row jsonb;
    new_row jsonb;
    id text;
BEGIN
    IF origin IS NULL THEN
        IF current_setting('application_name') LIKE 'stockade%' THEN
            RETURN NULL;
        END IF;
        origin := jsonb_build_object('role', 'postgresql:' || session_user);
    END IF;
    IF TG_OP <> 'INSERT' THEN
        old_row := to_jsonb(OLD) - TG_ARGV[1:];
        id := to_jsonb(OLD) ->> TG_ARGV[0];
    END IF;
    IF TG_OP <> 'DELETE' THEN
        new_row := to_jsonb(NEW) - TG_ARGV[1:];
        id := to_jsonb(NEW) ->> TG_ARGV[0];
    END IF;
    IF TG_OP = 'UPDATE' THEN
        SELECT jsonb_object_agg(key, old_row -> key), jsonb_object_agg(key, new_row -> key)
        INTO old_row, new_row
        FROM jsonb_object_keys(new_row) AS key
        WHERE old_row -> key IS DISTINCT FROM new_row -> key;
        IF new_row IS NULL THEN
            RETURN NULL;
        END IF;
    END IF;
    INSERT INTO audit_log (action, actor, role, credential, client, request_id, target_kind, target,
                           outcome, before, after)
    VALUES (TG_TABLE_NAME || '.' || lower(TG_OP), (origin ->> 'actor')::uuid, origin ->> 'role',
            (origin ->> 'credential')::uuid, origin ->> 'client', origin ->> 'request_id',
            TG_TABLE_NAME, id, 'done', old_row, new_row);
    RETURN NULL;
END
$$;

CREATE TRIGGER audit_change AFTER INSERT OR UPDATE OR DELETE ON products
    FOR EACH ROW EXECUTE FUNCTION audit_change('id', 'id', 'requested', 'updated_at');
CREATE TRIGGER audit_change AFTER INSERT OR UPDATE OR DELETE ON product_images
    FOR EACH ROW EXECUTE FUNCTION audit_change('id', 'id');
CREATE TRIGGER audit_change AFTER INSERT OR UPDATE OR DELETE ON sales
    FOR EACH ROW EXECUTE FUNCTION audit_change('id', 'id', 'request_fingerprint', 'updated_at');
CREATE TRIGGER audit_change AFTER INSERT ON refunds
    FOR EACH ROW EXECUTE FUNCTION audit_change('id', 'id', 'fingerprint', 'tries');
CREATE TRIGGER audit_change AFTER INSERT OR UPDATE OR DELETE ON incidents
    FOR EACH ROW EXECUTE FUNCTION audit_change('id', 'id');
-- What a user is called and logs in with is not for a log that outlives the user.
CREATE TRIGGER audit_change AFTER INSERT OR UPDATE OF role, disabled_at, password_changed_at OR DELETE ON users
    FOR EACH ROW EXECUTE FUNCTION audit_change('id', 'id', 'email', 'name', 'password_hash');
CREATE TRIGGER audit_change AFTER INSERT OR DELETE ON api_keys
    FOR EACH ROW EXECUTE FUNCTION audit_change('id', 'id', 'hash', 'last_used_at');

-- What operators did to a round. Redis decided it and the journal carried it here, so that it is
-- noted although the node that asked may be gone. A buyer who gives his own order back is none.
CREATE FUNCTION audit_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM orders WHERE id = NEW.order_id AND buyer_id = NEW.actor) THEN
        RETURN NULL;
    END IF;
    INSERT INTO audit_log (at, action, actor, target_kind, target, outcome, before, after)
    SELECT NEW.at, 'round.' || NEW.kind, NEW.actor, 'rounds', sales.id || '/' || NEW.round, 'done',
           jsonb_build_object('intent', rounds.intent, 'allocation', rounds.allocation,
               'seq', rounds.seq, 'unit_price', rounds.unit_price,
               'per_buyer_limit', rounds.per_buyer_limit, 'per_order_limit', rounds.per_order_limit,
               'opens_at', rounds.opens_at, 'closes_at', rounds.closes_at),
           jsonb_strip_nulls(jsonb_build_object('units', NEW.units, 'epoch', NEW.epoch,
               'seq', NEW.seq, 'order_id', NEW.order_id, 'operation_id', NEW.operation_id,
               'amendment', NEW.amendment))
    FROM (SELECT) AS always
    LEFT JOIN sales ON sales.number = NEW.sale
    LEFT JOIN rounds ON rounds.sale = NEW.sale AND rounds.round = NEW.round;
    RETURN NULL;
END
$$;
CREATE TRIGGER audit_event AFTER INSERT ON round_events
    FOR EACH ROW WHEN (NEW.actor IS NOT NULL AND NEW.kind IN ('restock', 'reduce', 'pause', 'resume',
        'close', 'amend', 'cancel', 'refund', 'return'))
    EXECUTE FUNCTION audit_event();
