//! Certificates of settled rounds, and the keys to verify them with.

use axum::extract::State;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::Path,
    check::Timestamp,
    problem::{Code, Problem},
    routes::{Access, Routes},
};
use crate::{
    domain::id::SaleId,
    ops::certificate::{CertificateKey, key_set},
    store::endings::Endings,
};

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(Access::Anyone, routes!(certificate), &[Code::NotFound])
        .add(Access::Anyone, routes!(keys), &[])
}

/// What became of a settled round, signed.
#[derive(Serialize, ToSchema)]
struct CertificateView {
    /// What is certified.
    #[schema(value_type = Object)]
    certificate: Value,
    /// The same, signed with Ed25519: a compact JWS (RFC 7515). These bytes count.
    jws: String,
    /// Which of the keys signed it.
    #[schema(example = "Ck0zZq3mJ7vYtR2a")]
    key_id: String,
    issued_at: Timestamp,
}

/// Get the certificate of a round
///
/// There is one as soon as the round is settled and audited, some time after its close; not found
/// before. It never changes.
#[utoipa::path(get, path = "/v1/sales/{id}/rounds/{round}/certificate", tag = "sales",
    params(("id" = Uuid, Path), ("round" = u32, Path, minimum = 1, example = 1)),
    responses((status = 200, description = "The certificate", body = CertificateView)))]
async fn certificate(
    State(endings): State<Endings>,
    Path((id, round)): Path<(Uuid, u32)>,
) -> Result<axum::Json<CertificateView>, Problem> {
    let certificate = endings
        .certificate(SaleId(id), round)
        .await?
        .ok_or_else(Problem::not_found)?;
    Ok(axum::Json(CertificateView {
        certificate: certificate.body,
        jws: certificate.jws,
        key_id: certificate.key_id,
        issued_at: Timestamp(certificate.issued_at),
    }))
}

/// Get the keys of certificates
///
/// A JSON Web Key Set (RFC 7517) of Ed25519 keys: the present one first, then those of older
/// certificates.
#[utoipa::path(get, path = "/v1/certificates/keys", tag = "sales",
    responses((status = 200, description = "The keys", body = Object)))]
async fn keys(
    State(endings): State<Endings>,
    State(key): State<Option<CertificateKey>>,
) -> Result<axum::Json<Value>, Problem> {
    Ok(axum::Json(key_set(key.as_ref(), &endings).await?))
}
