//! Whether every invariant of a sale holds, with both numbers.

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Path, Query},
    caller::Operator,
    check::Timestamp,
    page::{Page, Pagination},
    problem::{Code, Problem},
    routes::{Access, Routes},
};
use crate::{
    domain::id::SaleId,
    ops::auditor::{AuditError, Auditor, Check, RoundReport},
    sales::{SaleError, Shop},
    store::endings::{AuditRun, Endings},
};

pub(super) fn routes() -> Routes {
    const READS: &[Code] = &[Code::Validation, Code::NotFound];
    Routes::new()
        .add(Access::Operator, routes!(audit_sale), READS)
        .add(Access::Operator, routes!(audits), READS)
}

/// Which round to audit.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct AuditQuery {
    /// The current one if absent.
    #[param(minimum = 1, example = 1)]
    round: Option<u32>,
}

/// Audit a sale
///
/// Compares Redis, its journal and PostgreSQL. `pending` says that nothing is wrong and that the
/// writer has not stored enough to compare everything: ask again. While a store is away there is
/// no verdict but a 503.
#[utoipa::path(get, path = "/v1/sales/{id}/audit", tag = "sales",
    params(("id" = Uuid, Path), AuditQuery),
    responses((status = 200, description = "What came of it", body = RoundReport)))]
async fn audit_sale(
    _: Operator,
    State(auditor): State<Auditor>,
    Path(id): Path<Uuid>,
    Query(query): Query<AuditQuery>,
) -> Result<axum::Json<RoundReport>, Problem> {
    auditor
        .sale(SaleId(id), query.round)
        .await?
        .map(axum::Json)
        .ok_or_else(Problem::not_found)
}

/// Which looks to list.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct AuditsQuery {
    /// Looks on a page, 20 if absent.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<i64>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

/// A full look at a round that came to a verdict.
#[derive(Serialize, ToSchema)]
struct AuditRunView {
    id: i64,
    round: u32,
    /// `pass` or `fail`.
    #[schema(example = "pass")]
    verdict: String,
    /// Who looked: the patrol, or a step of the round's end (`settle`, `certify`, `archive`).
    #[schema(example = "patrol")]
    cause: String,
    checked_at: Timestamp,
    took_ms: i64,
    /// The checks that failed.
    #[schema(value_type = Vec<Check>)]
    failing: Value,
}

impl From<AuditRun> for AuditRunView {
    fn from(run: AuditRun) -> Self {
        Self {
            id: run.id,
            round: run.round.round,
            verdict: run.verdict,
            cause: run.cause,
            checked_at: Timestamp(run.checked_at),
            took_ms: run.took_ms,
            failing: run.failing,
        }
    }
}

/// List the audits of a sale
///
/// The full looks that the server takes by itself, all rounds, the latest first. Of each round the
/// last hundred that passed are kept and the last thousand that failed, for thirty days.
#[utoipa::path(get, path = "/v1/sales/{id}/audits", tag = "sales",
    params(("id" = Uuid, Path), AuditsQuery),
    responses((status = 200, description = "A page", body = Page<AuditRunView>)))]
async fn audits(
    _: Operator,
    State(shop): State<Arc<Shop>>,
    State(endings): State<Endings>,
    Path(id): Path<Uuid>,
    Query(query): Query<AuditsQuery>,
) -> Result<axum::Json<Page<AuditRunView>>, Problem> {
    let page = Pagination::<i64>::read(query.limit, query.cursor.as_deref())?;
    let sale = shop.directory.by_id(SaleId(id)).await;
    if sale.map_err(SaleError::from)?.is_none() {
        return Err(Problem::not_found());
    }
    let runs = endings.runs(SaleId(id), page.after, page.rows()).await?;
    Ok(axum::Json(page.page(
        runs,
        |run| run.id,
        AuditRunView::from,
    )))
}

impl From<AuditError> for Problem {
    fn from(error: AuditError) -> Self {
        match error {
            AuditError::Store(error) => error.into(),
            AuditError::Engine(_) | AuditError::Elsewhere(_) => {
                Self::unavailable("The sale's live state cannot be read at the moment.")
                    .caused_by(error)
            }
        }
    }
}
