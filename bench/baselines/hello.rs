//! The floor: what the request and the answer alone cost.

use axum::Router;
use axum::body::to_bytes;
use axum::extract::Request;
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};

use crate::route::{self, BODY_BYTES_MAX, IDEMPOTENCY_KEY};

/// A 201 of Stockade as it is on the wire, receipt included.
const BODY: &str = concat!(
    r#"{"id":"00000001-9228-8044-9f42-fb229e0aa61e","sale_id":"1b3d04d2-7162-860c-838c-a63690fb296c","#,
    r#""round":1,"buyer_id":"5001991f-ce70-440a-9120-6f5b4bf34210","quantity":1,"#,
    r#""unit_price":{"amount":1999,"currency":"EUR"},"total":{"amount":1999,"currency":"EUR"},"#,
    r#""status":"confirmed","seq":1,"accepted_at":"2026-11-21T19:01:03.090Z","durability":"fsync","#,
    r#""receipt":"v1.1.Gz0E0nFihgyDjKY2kPspbAAAAAGSKIBEn0L7Ip4Kph5QAZkfznBECpEgb1tL80IQAAAAAQAAAAEAAAAAAAAAAQAAAAAAAAADAAAAAAAAAAEAAAAAAAAHz0VVUgAAAaH_e8HyKsxttCrm2VwBAQ.oa3ryy1t9O4pTkOwYWPPf1i1nAiM0TWGrAG11CQl8qs"}"#
);
const LOCATION: HeaderValue =
    HeaderValue::from_static("/v1/orders/00000001-9228-8044-9f42-fb229e0aa61e");

pub(crate) fn router() -> Router {
    Router::new()
        .route("/v1/sales/{id}/orders", post(purchase))
        .route("/readyz", get(|| async {}))
}

/// Reads all of the request, and looks at none of it beyond whether it is there.
async fn purchase(request: Request) -> Response {
    let headers = request.headers();
    let whole = [AUTHORIZATION, IDEMPOTENCY_KEY, CONTENT_TYPE]
        .iter()
        .all(|name| headers.contains_key(name));
    match to_bytes(request.into_body(), BODY_BYTES_MAX).await {
        Ok(body) if whole && !body.is_empty() => route::created(LOCATION, BODY.into()),
        _ => StatusCode::BAD_REQUEST.into_response(),
    }
}
