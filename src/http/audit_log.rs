//! Who did what, when and from where.

use axum::extract::State;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::Query,
    caller::Admin,
    check::Timestamp,
    page::{Page, Pagination},
    problem::{Code, Problem},
    routes::{Access, Routes},
};
use crate::store::audit_log::{AuditLog, Filter, Row};

pub(super) fn routes() -> Routes {
    Routes::new().add(Access::Admin, routes!(list), &[Code::Validation])
}

/// Which rows to list; together they narrow.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct AuditLogQuery {
    /// Only this action.
    #[param(example = "sales_pause")]
    action: Option<String>,
    /// Only what this user did.
    actor: Option<Uuid>,
    /// Only what is about this id, or about something of it.
    target: Option<String>,
    /// Only this request.
    request_id: Option<String>,
    /// Only with this outcome: `done`, `abandoned` or the code of a problem.
    #[param(example = "forbidden")]
    outcome: Option<String>,
    /// Only from this instant on.
    #[param(value_type = Option<String>, format = DateTime)]
    since: Option<Timestamp>,
    /// Only before this instant.
    #[param(value_type = Option<String>, format = DateTime)]
    until: Option<Timestamp>,
    /// Rows on a page, 20 if absent.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<i64>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

/// Something that was asked for, or a change that came of it.
#[derive(Serialize, ToSchema)]
struct AuditLogRow {
    id: i64,
    /// Its place in the chain, by which `stockade audit-log verify` names it; null for the second
    /// until it has one.
    number: Option<i64>,
    at: Timestamp,
    /// `sales_pause`: this operation was asked for. `sales.update`: a row was changed. `round.pause`:
    /// an event of a round was stored.
    #[schema(example = "sales_pause")]
    action: String,
    /// The user, if one was known.
    actor: Option<Uuid>,
    /// What the actor acted as: `buyer`, `operator`, `admin`; `command` for the command line,
    /// `postgresql:<role>` for a change by hand.
    #[schema(example = "operator")]
    role: Option<String>,
    /// The session or the API key.
    credential: Option<Uuid>,
    /// The client's address; its network where nobody was known.
    #[schema(example = "192.0.2.7")]
    client: Option<String>,
    /// The same in all rows of a request.
    request_id: Option<String>,
    #[schema(example = "sales")]
    target_kind: Option<String>,
    target: Option<String>,
    /// `done`, `abandoned`, or the code of a problem.
    #[schema(example = "done")]
    outcome: String,
    /// How often: what changes nothing is counted by the minute.
    times: i64,
    /// What was there; of an update what is different after it.
    #[schema(value_type = Option<Object>)]
    before: Option<Value>,
    /// What is there since.
    #[schema(value_type = Option<Object>)]
    after: Option<Value>,
}

impl From<Row> for AuditLogRow {
    fn from(row: Row) -> Self {
        Self {
            id: row.id,
            number: row.number,
            at: Timestamp(row.at),
            action: row.action,
            actor: row.actor,
            role: row.role,
            credential: row.credential,
            client: row.client,
            request_id: row.request_id,
            target_kind: row.target_kind,
            target: row.target,
            outcome: row.outcome,
            times: row.times,
            before: row.before,
            after: row.after,
        }
    }
}

/// List the audit log
///
/// What operators and admins did, logins and what else happened to accounts, and who was turned away;
/// the latest first. For admins.
#[utoipa::path(get, path = "/v1/audit-log", tag = "audit-log", params(AuditLogQuery),
    responses((status = 200, description = "A page", body = Page<AuditLogRow>)))]
async fn list(
    _: Admin,
    State(log): State<AuditLog>,
    Query(query): Query<AuditLogQuery>,
) -> Result<axum::Json<Page<AuditLogRow>>, Problem> {
    let page = Pagination::<i64>::read(query.limit, query.cursor.as_deref())?;
    let filter = Filter {
        action: query.action,
        actor: query.actor,
        target: query.target,
        request_id: query.request_id,
        outcome: query.outcome,
        since: query.since.map(|since| since.0),
        until: query.until.map(|until| until.0),
        before: page.after,
        limit: page.rows(),
    };
    let rows = log.list(filter).await?;
    Ok(axum::Json(page.page(rows, |row| row.id, AuditLogRow::from)))
}
