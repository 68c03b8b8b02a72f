//! Waiting in line for units that come back.

use std::sync::Arc;

use axum::{
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Json, Path},
    caller::Caller,
    check::Check,
    hurdles::Proofs,
    idempotency::IdempotencyKey,
    orders,
    problem::{Code, Problem},
    routes::{Access, Routes},
};
use crate::{
    domain::{
        id::{BuyerId, SaleId},
        limits::BUYER_LIMIT_MAX,
    },
    sales::{LineView, Odds, Shop},
};

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(
            Access::Caller,
            routes!(join),
            &[
                Code::NotFound,
                Code::Conflict,
                Code::IdempotencyKeyMismatch,
                Code::AccountTooYoung,
                Code::ProofRequired,
                Code::ProofInvalid,
                Code::NotOpen,
                Code::Paused,
                Code::Closed,
                Code::OrderLimit,
                Code::BuyerLimit,
                Code::NotDurable,
            ],
        )
        .add(Access::Caller, routes!(get), &[Code::NotFound])
        .add(Access::Caller, routes!(leave), &[Code::NotFound])
}

/// What to wait for.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Wait {
    /// Units at most: fewer may be offered.
    #[schema(example = 1, minimum = 1, maximum = 1_000_000)]
    quantity: i64,
}

/// A place in line.
#[derive(Serialize, ToSchema)]
struct PlaceView {
    sale_id: Uuid,
    /// Which running of the sale the line is of.
    round: u32,
    /// 1 is next.
    position: u64,
    /// Buyers in line.
    waiting: u64,
    /// Units waited for at most.
    quantity: u64,
    /// Units of orders that wait for their payment: what of them is not paid comes to the line.
    held: u64,
    /// What the place is worth, from how the holds of this round have ended so far: `good` when more
    /// than twice as many units are expected back as buyers wait up to this place, `fair` about as
    /// many, `poor` fewer than half; `none` while nothing is held, `unknown` before ten holds ended.
    #[schema(inline)]
    odds: Odds,
    /// The clock that decides, in milliseconds since the Unix epoch.
    server_time_ms: i64,
}

impl PlaceView {
    fn of(view: &LineView) -> Result<Self, Problem> {
        let (position, quantity) = view.place.ok_or_else(Problem::not_found)?;
        Ok(Self {
            sale_id: view.facts.id.0,
            round: view.standing.round.round,
            position,
            waiting: view.standing.waiting,
            quantity,
            held: view.standing.counters.held,
            odds: view.odds,
            server_time_ms: view.standing.now_ms,
        })
    }
}

/// Wait for units
///
/// After the sale has sold out. Units that come back are held for whoever waits longest, before the
/// public sees them: an order with the status `held` appears among the buyer's orders, and must be
/// paid within the sale's `hold_seconds`. Joining twice is joining once: the first wish stays. With
/// an `Idempotency-Key` a retry finds the order that the place has become meanwhile; a sale with
/// `proof_of_work_bits` needs one, since a proof is for a key.
#[utoipa::path(post, path = "/v1/sales/{id}/waitlist", tag = "waitlist", request_body = Wait,
    params(("id" = Uuid, Path), ("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible ASCII characters"),
        ("Proof-Of-Work" = Option<String>, Header, description = "The solved challenge, if the sale has `proof_of_work_bits`")),
    responses((status = 200, description = "The place", body = PlaceView),
              (status = 201, description = "The order that the place has become", body = orders::OrderBody)))]
async fn join(
    Caller(caller): Caller,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    key: Option<IdempotencyKey>,
    proofs: Proofs,
    Json(wait): Json<Wait>,
) -> Result<Response, Problem> {
    let mut check = Check::new();
    let quantity = check.units("#/quantity", wait.quantity, 1..=BUYER_LIMIT_MAX);
    check.done()?;
    let key = key.as_ref().map(|key| key.0.as_str());
    let joined = shop
        .join_line(SaleId(id), proofs.of(&caller), key, quantity)
        .await?;
    match joined {
        Ok(view) => Ok(axum::Json(PlaceView::of(&view)?).into_response()),
        Err((order, sale)) => orders::accepted(&order, &sale, &shop.receipts, true),
    }
}

/// Get one's place in line
#[utoipa::path(get, path = "/v1/sales/{id}/waitlist", tag = "waitlist", params(("id" = Uuid, Path)),
    responses((status = 200, description = "The place", body = PlaceView)))]
async fn get(
    Caller(caller): Caller,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
) -> Result<axum::Json<PlaceView>, Problem> {
    let view = shop.line(SaleId(id), BuyerId(caller.user)).await?;
    PlaceView::of(&view).map(axum::Json)
}

/// Wait no more
///
/// Doing it twice is doing it once.
#[utoipa::path(delete, path = "/v1/sales/{id}/waitlist", tag = "waitlist", params(("id" = Uuid, Path)),
    responses((status = 204, description = "Out of the line")))]
async fn leave(
    Caller(caller): Caller,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
) -> Result<StatusCode, Problem> {
    shop.leave_line(SaleId(id), BuyerId(caller.user)).await?;
    Ok(StatusCode::NO_CONTENT)
}
