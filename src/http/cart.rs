//! The cart, and buying all of it or nothing.

use axum::{
    extract::State,
    http::{StatusCode, header::ETAG},
    response::{IntoResponse, Response},
};
use futures::future::join_all;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Json, Nothing},
    caller::Caller,
    check::{Check, Price, Timestamp},
    hurdles::{self, Proofs},
    idempotency::{IDEMPOTENCY_REPLAYED, IdempotencyKey, REPLAYED},
    orders::{self, OrderBody},
    problem::{Code, Problem},
    routes::{Access, Routes},
    version::{IfMatch, etag},
};
use crate::{
    domain::{
        cart::{CartError, LINES_MAX, Line, merge},
        id::{BuyerId, SaleId},
        limits::BUYER_LIMIT_MAX,
        money::Money,
        order::{Decision, Refusal},
        round,
    },
    sales::{CheckedOut, Checkouts, LineAnswer, LineSaid, SaleError, Shop},
    store::carts::Cart,
};

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(Access::Caller, routes!(get), &[])
        .add(Access::Caller, routes!(put), &[Code::PreconditionFailed])
        .add(
            Access::Caller,
            routes!(checkout),
            &[
                Code::Conflict,
                Code::CheckoutFailed,
                Code::IdempotencyKeyMissing,
                Code::NotDurable,
            ],
        )
}

/// Some units of one sale.
#[derive(Clone, Copy, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct LineRequest {
    sale_id: Uuid,
    /// Units.
    #[schema(example = 1, minimum = 1, maximum = 1_000_000)]
    quantity: i64,
}

/// What the cart shall hold.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CartRequest {
    /// At most 16 sales; lines of one sale are put together.
    lines: Vec<LineRequest>,
}

/// A line as its sale stands.
#[derive(Serialize, ToSchema)]
struct LineView {
    sale_id: Uuid,
    /// The name of the sale; absent when there is no such sale any more.
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    quantity: u64,
    /// Of one unit, at the moment.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Price)]
    unit_price: Option<Money>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Price)]
    total: Option<Money>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(inline)]
    state: Option<round::State>,
    /// Units to be had at the moment.
    #[serde(skip_serializing_if = "Option::is_none")]
    remaining: Option<u64>,
}

/// What a buyer means to buy. It holds nothing: prices and stock are those of the moment.
#[derive(Serialize, ToSchema)]
struct CartView {
    lines: Vec<LineView>,
    /// Counts changes.
    version: i64,
}

async fn view(shop: &Shop, cart: Cart) -> Response {
    let lines = cart.lines.iter().map(async |line| {
        // A sale that cannot be looked at now is shown without what is not known of it.
        let sale = shop.view(line.sale).await.ok();
        let unit_price = sale.as_ref().map(|sale| sale.facts.terms.unit_price);
        LineView {
            sale_id: line.sale.0,
            name: sale.as_ref().map(|sale| sale.facts.name.clone()),
            quantity: line.quantity,
            unit_price,
            total: unit_price.and_then(|price| price.times(line.quantity)),
            state: sale.as_ref().map(|sale| sale.standing.state),
            remaining: sale.as_ref().map(|sale| sale.standing.counters.remaining),
        }
    });
    let body = CartView {
        lines: join_all(lines).await,
        version: cart.version,
    };
    ([(ETAG, etag(cart.version))], axum::Json(body)).into_response()
}

/// Get the cart
#[utoipa::path(get, path = "/v1/cart", tag = "cart",
    responses((status = 200, description = "The cart", body = CartView)))]
async fn get(
    Caller(caller): Caller,
    State(checkouts): State<Checkouts>,
) -> Result<Response, Problem> {
    let cart = checkouts.cart(BuyerId(caller.user)).await?;
    Ok(view(&checkouts.shop, cart).await)
}

/// Fill the cart
///
/// In place of what is in it. With `If-Match` only if nobody has changed it since.
#[utoipa::path(put, path = "/v1/cart", tag = "cart", request_body = CartRequest,
    params(("If-Match" = Option<String>, Header, description = "The ETag of the version to replace")),
    responses((status = 200, description = "The cart", body = CartView)))]
async fn put(
    Caller(caller): Caller,
    State(checkouts): State<Checkouts>,
    version: Option<IfMatch>,
    Json(request): Json<CartRequest>,
) -> Result<Response, Problem> {
    let mut check = Check::new();
    let mut lines = Vec::with_capacity(request.lines.len().min(LINES_MAX));
    for (at, line) in request.lines.iter().enumerate() {
        let pointer = format!("#/lines/{at}/quantity");
        let quantity = check.units(&pointer, line.quantity, 1..=BUYER_LIMIT_MAX);
        let sale = SaleId(line.sale_id);
        lines.push(Line { sale, quantity });
    }
    let lines = match merge(&lines) {
        Ok(lines) => lines,
        Err(error @ CartError::Lines) => {
            check.refuse("#/lines", error.to_string());
            vec![]
        }
        Err(error @ CartError::Quantity(at)) => {
            check.refuse(&format!("#/lines/{at}/quantity"), error.to_string());
            vec![]
        }
    };
    for line in &lines {
        // Whether it can be bought is the checkout's business.
        if let Err(SaleError::NotFound) = checkouts.shop.view(line.sale).await {
            let at = request.lines.iter();
            let at = at.take_while(|asked| asked.sale_id != line.sale.0).count();
            let pointer = format!("#/lines/{at}/sale_id");
            check.refuse(&pointer, "there is no such sale");
        }
    }
    check.done()?;
    let cart = checkouts
        .fill(
            BuyerId(caller.user),
            lines,
            version.map(|version| version.0),
        )
        .await?;
    Ok(view(&checkouts.shop, cart).await)
}

/// An accepted checkout: it holds only what never changes again, so that every retry gets the same
/// bytes.
#[derive(Serialize, ToSchema)]
struct CheckoutBody {
    id: Uuid,
    /// One for each line of the cart, in its order.
    orders: Vec<OrderBody>,
    /// What all of it costs, once for each currency.
    #[schema(value_type = Vec<Price>)]
    totals: Vec<Money>,
    /// The earliest deadline of an order that waits for its payment.
    #[serde(skip_serializing_if = "Option::is_none")]
    held_until: Option<Timestamp>,
}

/// Buy the cart
///
/// All of its lines, or none: the 201 is there when every line is held or bought, and empties the
/// cart. Else `checkout_failed` says why, line by line, and nothing is held. A retry with the same
/// key gets the same answer; only when no line was accepted for even a moment may the same key try
/// again.
#[utoipa::path(post, path = "/v1/cart/checkout", tag = "cart",
    params(("Idempotency-Key" = String, Header, description = "1 to 255 visible ASCII characters"),
        ("Proof-Of-Work" = Option<String>, Header, description = "The solved challenges of those sales that have `proof_of_work_bits`, separated by commas")),
    responses((status = 201, description = "The orders", body = CheckoutBody)))]
async fn checkout(
    Caller(caller): Caller,
    State(checkouts): State<Checkouts>,
    key: IdempotencyKey,
    proofs: Proofs,
    _: Option<Json<Nothing>>,
) -> Result<Response, Problem> {
    let checked_out = checkouts
        .checkout(proofs.of(&caller), &key.0, reasons)
        .await?;
    let (id, orders, replayed) = match checked_out {
        CheckedOut::Accepted {
            id,
            orders,
            replayed,
        } => (id, orders, replayed),
        CheckedOut::Refused(lines) => {
            let problem = failed().fact("lines", reasons(&lines));
            return Err(problem);
        }
        CheckedOut::Failed(lines) => return Err(failed().fact("lines", lines).looked_up()),
    };
    let shop = &checkouts.shop;
    let mut bodies = Vec::with_capacity(orders.len());
    let mut totals: Vec<Money> = Vec::new();
    let mut held_until = None;
    for (order, sale) in &orders {
        let order = order.as_accepted();
        bodies.push(OrderBody::of_acceptance(&order, sale, &shop.receipts)?);
        let total = order.total();
        match totals.iter_mut().find(|sum| sum.currency == total.currency) {
            Some(sum) => sum.amount += total.amount,
            None => totals.push(total),
        }
        held_until = [held_until, order.hold_until_ms()]
            .into_iter()
            .flatten()
            .min();
    }
    let body = CheckoutBody {
        id,
        orders: bodies,
        totals,
        held_until: held_until.map(Timestamp::from_ms),
    };
    let replayed = replayed.then_some([(IDEMPOTENCY_REPLAYED, REPLAYED)]);
    Ok((StatusCode::CREATED, replayed, axum::Json(body)).into_response())
}

fn failed() -> Problem {
    let detail = "The cart was not bought: nothing is held. `lines` says why.";
    Problem::new(Code::CheckoutFailed, detail)
}

/// Why a cart was not bought, line by line.
fn reasons(lines: &[LineAnswer]) -> Value {
    let reason = |answered: &LineAnswer| {
        let mut reason = json!({
            "sale_id": answered.line.sale.0,
            "quantity": answered.line.quantity,
        });
        let more = match &answered.said {
            LineSaid::NoSale => json!({ "code": "not_found", "detail": "There is no such sale." }),
            LineSaid::Hurdle(hurdle) => hurdles::stopped(answered.line.sale, *hurdle).brief(),
            LineSaid::Decided(answer) => match answer.decision {
                Decision::Refused(Refusal::LeftOut) => json!({
                    "code": "left_out",
                    "detail": "It could be had; another line could not.",
                }),
                Decision::Refused(refusal) => orders::refused(refusal, answer).brief(),
                Decision::Accepted(_) | Decision::Replayed(_) => json!({
                    "code": "left_out",
                    "detail": "It was held, and was let go because of another line.",
                }),
            },
        };
        if let (Some(reason), Value::Object(more)) = (reason.as_object_mut(), more) {
            reason.extend(more);
        }
        reason
    };
    Value::Array(lines.iter().map(reason).collect())
}
