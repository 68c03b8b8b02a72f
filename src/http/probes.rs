//! What machines ask: is it alive, is it ready, how is it doing.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{HeaderName, header::CONTENT_TYPE},
};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::{
    problem::Problem,
    routes::{Access, Routes},
};
use crate::{metrics::Metrics, readiness::Readiness};

/// What `prometheus_client` writes.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(Access::Anyone, routes!(livez), &[])
        .add(Access::Anyone, routes!(readyz), &[])
        .add(Access::Internal, routes!(metrics), &[])
}

/// How it is.
#[derive(Serialize, ToSchema)]
struct Health {
    #[schema(example = "ok")]
    status: &'static str,
    checks: Vec<HealthCheck>,
}

/// One condition.
#[derive(Serialize, ToSchema)]
struct HealthCheck {
    #[schema(example = "postgresql")]
    name: &'static str,
    ok: bool,
    /// Why not, or what else there is to know.
    detail: Option<String>,
    /// The node wants traffic although it is not `ok`: only some sales do not sell. Absent otherwise.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    #[schema(required = false)]
    optional: bool,
}

/// Is the process alive
///
/// Asks nothing of Redis or PostgreSQL: restarting this process would not mend them.
#[utoipa::path(get, path = "/livez", tag = "health",
    responses((status = 200, description = "It is", body = Health)))]
async fn livez() -> axum::Json<Health> {
    axum::Json(Health {
        status: "ok",
        checks: Vec::new(),
    })
}

/// Does it want traffic
#[utoipa::path(get, path = "/readyz", tag = "health",
    responses((status = 200, description = "It does", body = Health)))]
async fn readyz(State(readiness): State<Readiness>) -> Result<axum::Json<Health>, Problem> {
    let checks: Vec<_> = readiness
        .conditions()
        .into_iter()
        .map(|condition| HealthCheck {
            name: condition.name,
            ok: condition.missing.is_none(),
            optional: condition.optional,
            detail: condition.missing.or(condition.note),
        })
        .collect();
    if checks.iter().all(|check| check.ok || check.optional) {
        Ok(axum::Json(Health {
            status: "ok",
            checks,
        }))
    } else {
        let checks = serde_json::to_value(checks).map_err(Problem::internal)?;
        Err(Problem::unavailable("Not ready yet.").fact("checks", checks))
    }
}

/// How is it doing
#[utoipa::path(get, path = "/metrics", tag = "health",
    responses((status = 200, description = "OpenMetrics text", body = String, content_type = "application/openmetrics-text")))]
async fn metrics(State(metrics): State<Arc<Metrics>>) -> ([(HeaderName, &'static str); 1], String) {
    ([(CONTENT_TYPE, OPENMETRICS)], metrics.encode())
}
