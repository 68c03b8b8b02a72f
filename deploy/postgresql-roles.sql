-- What each process may do in PostgreSQL. To be run by the owner of the schema, in its database, after
-- every `stockade migrate`; twice does no harm. docs/DEPLOYMENT.md says how the roles are used.
--
--   stockade_http    `stockade serve --with http`
--   stockade_writer  `stockade serve --with writer`, `stockade writer`
--
-- Neither owns anything: no table is made, emptied or dropped, no trigger switched off, and the audit
-- log is only added to. Orders and events are the writer's alone, accounts the other's.

DO $$
DECLARE
    role text;
BEGIN
    FOREACH role IN ARRAY ARRAY['stockade_http', 'stockade_writer'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role) THEN
            EXECUTE format('CREATE ROLE %I NOLOGIN', role);
        END IF;
    END LOOP;
END
$$;

REVOKE ALL ON ALL TABLES IN SCHEMA public FROM stockade_http, stockade_writer;
GRANT USAGE ON SCHEMA public TO stockade_http, stockade_writer;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO stockade_http, stockade_writer;

-- Who logs in with what is not the writer's business.
REVOKE SELECT ON users, sessions, refresh_tokens, ended_sessions, api_keys, buyer_profiles, carts,
    erased_users FROM stockade_writer;

-- Every process verifies Redis, raises the epoch and tells what was lost.
GRANT INSERT, UPDATE ON journal_positions, incidents, receipt_keys TO stockade_http, stockade_writer;
GRANT INSERT, DELETE ON epochs TO stockade_http, stockade_writer;
GRANT INSERT, UPDATE, DELETE ON lost_acceptances, node_floors TO stockade_http, stockade_writer;
GRANT UPDATE ON rounds TO stockade_http, stockade_writer;

-- The content of the audit log; its chain is the writer's.
GRANT INSERT (at, action, actor, role, credential, client, request_id, target_kind, target, outcome,
              times, before, after) ON audit_log TO stockade_http, stockade_writer;
GRANT UPDATE (number, previous, hash) ON audit_log TO stockade_writer;
GRANT UPDATE ON audit_log_head TO stockade_writer;

GRANT INSERT, UPDATE ON orders, dead_letters, certificates TO stockade_writer;
GRANT INSERT ON round_events TO stockade_writer;
GRANT INSERT, DELETE ON audit_runs TO stockade_writer;

GRANT INSERT, UPDATE, DELETE ON users, sessions, refresh_tokens, ended_sessions, api_keys,
    buyer_profiles, carts, products, product_images, image_renditions, sandbox_charges,
    sandbox_refunds, sandbox_notices TO stockade_http;
GRANT INSERT ON erased_users, missed_windows, rounds TO stockade_http;
GRANT INSERT, UPDATE ON sales, checkouts, payments, payment_orders, refunds, refusals TO stockade_http;
GRANT INSERT, UPDATE, DELETE ON gateway_events TO stockade_http;
GRANT UPDATE ON catalogue TO stockade_http;
