//! The route that every design serves, and everything about it that is not the design: the token,
//! the request, the answers. They are Stockade's, except that nobody else signs receipts.

use std::sync::Arc;

use anyhow::Result;
use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Path, Request, State};
use axum::http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, LOCATION, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use chrono::{DateTime, SecondsFormat};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The largest body that is read.
pub(crate) const BODY_BYTES_MAX: usize = 64 * 1024;
pub(crate) const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// What every sale sells here: the price is not what is compared.
const PRICE_CENTS: u64 = 1999;

/// A request to buy, understood.
pub(crate) struct Purchase {
    pub(crate) sale: Uuid,
    pub(crate) buyer: Uuid,
    pub(crate) key: String,
    pub(crate) quantity: u32,
}

/// What became of it.
pub(crate) enum Outcome {
    Accepted(Order),
    /// The key has this order already.
    Replayed(Order),
    /// The code of Stockade's problem.
    Refused(&'static str),
}

/// What is known of an order only after it was decided.
#[derive(Clone, Copy)]
pub(crate) struct Order {
    pub(crate) id: Uuid,
    pub(crate) quantity: u32,
    pub(crate) seq: u64,
    pub(crate) accepted_ms: i64,
}

/// A way to decide on purchases.
pub(crate) trait Design: Send + Sync + 'static {
    fn purchase(&self, purchase: &Purchase) -> impl Future<Output = Result<Outcome>> + Send;
}

struct Shop<D> {
    design: Arc<D>,
    key: DecodingKey,
    rules: Validation,
}

#[derive(Deserialize)]
struct Claims {
    sub: Uuid,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wish {
    quantity: u32,
}

#[derive(Serialize)]
struct Money {
    amount: u64,
    currency: &'static str,
}

#[derive(Serialize)]
struct OrderBody {
    id: Uuid,
    sale_id: Uuid,
    round: u32,
    buyer_id: Uuid,
    quantity: u32,
    unit_price: Money,
    total: Money,
    status: &'static str,
    seq: u64,
    accepted_at: String,
    durability: &'static str,
}

pub(crate) fn router<D: Design>(design: Arc<D>, secret: &str) -> Router {
    let mut rules = Validation::new(Algorithm::HS256);
    rules.set_issuer(&["stockade"]);
    rules.set_audience(&["stockade"]);
    let shop = Shop {
        design,
        key: DecodingKey::from_secret(secret.as_bytes()),
        rules,
    };
    Router::new()
        .route("/v1/sales/{id}/orders", post(purchase::<D>))
        .route("/readyz", get(|| async {}))
        .with_state(Arc::new(shop))
}

async fn purchase<D: Design>(
    State(shop): State<Arc<Shop<D>>>,
    Path(sale): Path<Uuid>,
    request: Request,
) -> Response {
    let (parts, body) = request.into_parts();
    let text = |name| {
        parts
            .headers
            .get(name)
            .and_then(|value: &HeaderValue| value.to_str().ok())
    };
    let token = text(AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer "));
    let claims = token.and_then(|token| decode::<Claims>(token, &shop.key, &shop.rules).ok());
    let Some(claims) = claims else {
        return problem("unauthenticated");
    };
    let Some(key) = text(IDEMPOTENCY_KEY).filter(|key| (1..=255).contains(&key.len())) else {
        return problem("idempotency_key_missing");
    };
    let Ok(body) = to_bytes(body, BODY_BYTES_MAX).await else {
        return problem("validation");
    };
    let wish = match serde_json::from_slice::<Wish>(&body) {
        Ok(wish) if wish.quantity > 0 => wish,
        _ => return problem("validation"),
    };
    let purchase = Purchase {
        sale,
        buyer: claims.claims.sub,
        key: key.to_owned(),
        quantity: wish.quantity,
    };
    match shop.design.purchase(&purchase).await {
        Ok(Outcome::Accepted(order)) => accepted(&purchase, order),
        Ok(Outcome::Replayed(order)) if order.quantity != purchase.quantity => {
            problem("idempotency_key_mismatch")
        }
        Ok(Outcome::Replayed(order)) => {
            let mut response = accepted(&purchase, order);
            let replayed = HeaderValue::from_static("true");
            response.headers_mut().insert(REPLAYED, replayed);
            response
        }
        Ok(Outcome::Refused(code)) => problem(code),
        Err(_) => problem("unavailable"),
    }
}

fn accepted(purchase: &Purchase, order: Order) -> Response {
    let money = |amount| Money {
        amount,
        currency: "EUR",
    };
    let at = DateTime::from_timestamp_millis(order.accepted_ms).unwrap_or_default();
    let body = OrderBody {
        id: order.id,
        sale_id: purchase.sale,
        round: 1,
        buyer_id: purchase.buyer,
        quantity: order.quantity,
        unit_price: money(PRICE_CENTS),
        total: money(PRICE_CENTS * u64::from(order.quantity)),
        status: "confirmed",
        seq: order.seq,
        accepted_at: at.to_rfc3339_opts(SecondsFormat::Millis, true),
        durability: "fsync",
    };
    let location = HeaderValue::try_from(format!("/v1/orders/{}", order.id));
    match (serde_json::to_vec(&body), location) {
        (Ok(body), Ok(location)) => created(location, body.into()),
        _ => problem("internal"),
    }
}

/// A 201 with the headers of Stockade's.
pub(crate) fn created(location: HeaderValue, body: Bytes) -> Response {
    let json = HeaderValue::from_static("application/json");
    let mut response = (StatusCode::CREATED, Body::from(body)).into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, json);
    headers.insert(LOCATION, location);
    common(&mut response);
    response
}

fn problem(code: &'static str) -> Response {
    let (status, outcome, retry) = match code {
        "unauthenticated" => (StatusCode::UNAUTHORIZED, "not_applied", "never"),
        "idempotency_key_missing" | "validation" => {
            (StatusCode::BAD_REQUEST, "not_applied", "never")
        }
        "not_found" => (StatusCode::NOT_FOUND, "not_applied", "never"),
        "idempotency_key_mismatch" => (StatusCode::UNPROCESSABLE_ENTITY, "not_applied", "never"),
        "unavailable" => (StatusCode::SERVICE_UNAVAILABLE, "unknown", "same_key"),
        "internal" => (StatusCode::INTERNAL_SERVER_ERROR, "unknown", "same_key"),
        _ => (StatusCode::CONFLICT, "not_applied", "never"),
    };
    let body = format!(
        r#"{{"type":"/docs/problems/{code}","title":"{code}","status":{},"code":"{code}","outcome":"{outcome}","retry":"{retry}"}}"#,
        status.as_u16()
    );
    let mut response = (status, body).into_response();
    let json = HeaderValue::from_static("application/problem+json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    common(&mut response);
    response
}

fn common(response: &mut Response) {
    let headers = response.headers_mut();
    for (name, value) in [
        (REQUEST_ID, "01a1ff7b-c1f1-7292-86aa-10d0bb798189"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (
            CONTENT_SECURITY_POLICY,
            "default-src 'none'; frame-ancestors 'none'",
        ),
        (CACHE_CONTROL, "no-store"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
}
