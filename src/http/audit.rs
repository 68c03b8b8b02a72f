//! Whether every invariant of a sale holds, with both numbers.

use axum::extract::State;
use serde::Deserialize;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Path, Query},
    caller::Operator,
    problem::{Code, Problem},
    routes::{Access, Routes},
};
use crate::{
    domain::id::SaleId,
    ops::auditor::{AuditError, Auditor, RoundReport},
};

pub(super) fn routes() -> Routes {
    Routes::new().add(
        Access::Operator,
        routes!(audit_sale),
        &[Code::Validation, Code::NotFound],
    )
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
