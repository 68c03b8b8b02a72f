//! Orders: the purchase, and what becomes of it.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::{
        HeaderValue, StatusCode,
        header::{CACHE_CONTROL, LOCATION},
    },
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Json, Path, Query},
    caller::Caller,
    check::{Check, Price, Timestamp},
    idempotency::{IDEMPOTENCY_REPLAYED, IdempotencyKey, REPLAYED},
    page::{Page, Pagination},
    problem::{Code, Problem},
    routes::{Access, Routes},
    sales::NO_STORE,
};
use crate::{
    auth::token::Identity,
    domain::{
        id::{BuyerId, OrderId, SaleId},
        limits::BUYER_LIMIT_MAX,
        order::{self, Decision, Refusal},
    },
    engine::Answer,
    sales::{OrderView, Shop},
    store::{orders::Filter, sales::SaleFacts},
};

/// How long a buyer should wait before asking a paused sale again.
const PAUSED_RETRY: Duration = Duration::from_secs(2);

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(
            Access::Caller,
            routes!(purchase),
            &[
                Code::NotFound,
                Code::NotOpen,
                Code::Paused,
                Code::Closed,
                Code::SoldOut,
                Code::Insufficient,
                Code::BuyerLimit,
                Code::OrderLimit,
                Code::IdempotencyKeyMissing,
                Code::IdempotencyKeyMismatch,
            ],
        )
        .add(
            Access::Caller,
            routes!(list),
            &[Code::Forbidden, Code::NotFound, Code::Validation],
        )
        .add(Access::Caller, routes!(get), &[Code::NotFound])
        .add(
            Access::Caller,
            routes!(cancel),
            &[Code::NotFound, Code::Conflict],
        )
}

/// What to buy.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewOrder {
    /// Units, 1 to 10^6.
    #[schema(example = 1, minimum = 1, maximum = 1_000_000)]
    quantity: i64,
}

/// What was accepted: facts fixed at that instant, so that every replay has the same bytes.
#[derive(Serialize, ToSchema)]
struct Acceptance {
    id: Uuid,
    sale_id: Uuid,
    round: u32,
    buyer_id: Uuid,
    quantity: u64,
    unit_price: Price,
    total: Price,
    /// `confirmed`, or `held` until it is paid.
    #[schema(example = "confirmed")]
    status: &'static str,
    /// Its place among the events of its round.
    seq: u64,
    accepted_at: Timestamp,
    /// What the acceptance survives.
    #[schema(example = "fsync")]
    durability: &'static str,
}

impl Acceptance {
    fn new(order: &order::Order, sale: SaleId) -> Self {
        Self {
            id: order.id.0,
            sale_id: sale.0,
            round: order.round.round,
            buyer_id: order.buyer.0,
            quantity: order.quantity,
            unit_price: order.unit_price.into(),
            total: order.total().into(),
            status: order.accepted_as.as_str(),
            seq: order.seq,
            accepted_at: Timestamp::from_ms(order.accepted_at_ms),
            durability: order.durability.as_str(),
        }
    }
}

/// An order as it stands.
#[derive(Serialize, ToSchema)]
struct Order {
    #[serde(flatten)]
    acceptance: Acceptance,
    /// Whether PostgreSQL has it.
    stored: bool,
}

impl Order {
    fn new(order: &order::Order, sale: &SaleFacts, stored: bool) -> Self {
        let status = order.status.as_str();
        let acceptance = Acceptance {
            status,
            ..Acceptance::new(order, sale.id)
        };
        Self { acceptance, stored }
    }
}

impl From<OrderView> for Order {
    fn from(
        OrderView {
            order,
            sale,
            stored,
        }: OrderView,
    ) -> Self {
        Self::new(&order, &sale, stored)
    }
}

/// Buy
///
/// A 201 is final. Send the same request with the same key again whenever the answer is lost,
/// `unknown` or 503: it has one effect and the same answer, also after sell-out and after the end.
#[utoipa::path(post, path = "/v1/sales/{id}/orders", tag = "orders", request_body = NewOrder,
    params(("id" = Uuid, Path), ("Idempotency-Key" = String, Header, description = "1 to 255 visible ASCII characters")),
    responses((status = 201, description = "Accepted", body = Acceptance)))]
async fn purchase(
    Caller(buyer): Caller,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    key: IdempotencyKey,
    Json(body): Json<NewOrder>,
) -> Result<Response, Problem> {
    let mut check = Check::new();
    let quantity = check.units("#/quantity", body.quantity, 1..=BUYER_LIMIT_MAX);
    check.done()?;
    let (answer, sale) = shop
        .purchase(SaleId(id), BuyerId(buyer.user), &key.0, quantity)
        .await?;
    let (order, replayed) = match answer.decision {
        Decision::Accepted(order) => (order, None),
        Decision::Replayed(order) => (order, Some([(IDEMPOTENCY_REPLAYED, REPLAYED)])),
        Decision::Refused(refusal) => return Err(refuse(refusal, &answer)),
    };
    let location =
        HeaderValue::from_str(&format!("/v1/orders/{}", order.id)).map_err(Problem::internal)?;
    let headers = [(LOCATION, location), (CACHE_CONTROL, NO_STORE)];
    let body = axum::Json(Acceptance::new(&order, sale.id));
    Ok((StatusCode::CREATED, headers, replayed, body).into_response())
}

/// The refusal of a purchase. `never` only where a script looked the key up, and where waiting
/// does not help.
fn refuse(refusal: Refusal, answer: &Answer) -> Problem {
    let (problem, waiting_helps) = match refusal {
        Refusal::Mismatch => {
            let detail = "This key has bought something else in this sale.";
            (Problem::new(Code::IdempotencyKeyMismatch, detail), false)
        }
        Refusal::NotOpen { opens_at_ms } => {
            let starts_in_ms = (opens_at_ms - answer.now_ms).max(0);
            let problem = Problem::new(Code::NotOpen, "The sale is not open yet.")
                .after(Duration::from_millis(starts_in_ms.unsigned_abs()))
                .fact("opens_at", Timestamp::from_ms(opens_at_ms).to_string())
                .fact("starts_in_ms", starts_in_ms);
            (problem, true)
        }
        Refusal::Paused => {
            let problem = Problem::new(Code::Paused, "The sale is paused.").after(PAUSED_RETRY);
            (problem, true)
        }
        Refusal::Closed => (Problem::new(Code::Closed, "The sale is closed."), false),
        Refusal::OrderLimit { limit, held } => {
            let detail = format!("One order may ask for {limit} units at most.");
            let problem = Problem::new(Code::OrderLimit, detail);
            (problem.fact("limit", limit).fact("held", held), false)
        }
        Refusal::BuyerLimit { limit, held } => {
            let detail = format!("One buyer may have {limit} units; you have {held}.");
            let problem = Problem::new(Code::BuyerLimit, detail);
            (problem.fact("limit", limit).fact("held", held), false)
        }
        Refusal::SoldOut => (Problem::new(Code::SoldOut, "No unit is left."), false),
        Refusal::Insufficient { remaining } => {
            let detail = format!("Only {remaining} units are left.");
            let problem = Problem::new(Code::Insufficient, detail);
            (problem.fact("remaining", remaining), false)
        }
    };
    if answer.looked_up && !waiting_helps {
        problem.looked_up()
    } else {
        problem
    }
}

/// Whose orders the caller may see: operators everybody's.
fn sight(caller: Identity) -> Option<BuyerId> {
    (!caller.role.operates()).then_some(BuyerId(caller.user))
}

/// Get an order as it stands
///
/// At once after its 201, on every node.
#[utoipa::path(get, path = "/v1/orders/{id}", tag = "orders", params(("id" = Uuid, Path)),
    responses((status = 200, description = "The order", body = Order)))]
async fn get(
    Caller(caller): Caller,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
) -> Result<Response, Problem> {
    Ok(shown(shop.order(OrderId(id), sight(caller)).await?))
}

/// Give an order back
///
/// Its units are for sale again. Doing so twice is doing it once.
#[utoipa::path(post, path = "/v1/orders/{id}/cancel", tag = "orders", params(("id" = Uuid, Path)),
    responses((status = 200, description = "The order", body = Order)))]
async fn cancel(
    Caller(caller): Caller,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
) -> Result<Response, Problem> {
    let view = shop.cancel(OrderId(id), sight(caller), caller.user).await?;
    if view.order.status != order::Status::Cancelled {
        return Err(Problem::new(
            Code::Conflict,
            "This order cannot be cancelled any more.",
        ));
    }
    Ok(shown(view))
}

fn shown(view: OrderView) -> Response {
    ([(CACHE_CONTROL, NO_STORE)], axum::Json(Order::from(view))).into_response()
}

/// What an order can be.
#[derive(Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum StatusWord {
    Held,
    Confirmed,
    Expired,
    Cancelled,
    Refunded,
}

/// Which orders to list.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct OrderQuery {
    /// Only orders of this sale.
    sale_id: Option<Uuid>,
    /// Only orders with this status.
    #[param(inline)]
    status: Option<StatusWord>,
    /// Only orders of this buyer; for operators.
    buyer_id: Option<Uuid>,
    /// Orders on a page, 20 if absent.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<i64>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

/// List orders
///
/// Buyers see their own, newest first; operators all. Follows PostgreSQL: an order is here once it
/// is stored.
#[utoipa::path(get, path = "/v1/orders", tag = "orders", params(OrderQuery),
    responses((status = 200, description = "A page", body = Page<Order>)))]
async fn list(
    Caller(caller): Caller,
    State(shop): State<Arc<Shop>>,
    Query(query): Query<OrderQuery>,
) -> Result<Response, Problem> {
    let page = Pagination::<Uuid>::read(query.limit, query.cursor.as_deref())?;
    let asked = query.buyer_id.map(BuyerId);
    let own = sight(caller);
    if own.is_some() && asked.is_some() && asked != own {
        return Err(Problem::new(
            Code::Forbidden,
            "Buyers see their own orders only.",
        ));
    }
    let filter = Filter {
        buyer: own.or(asked),
        sale: None,
        status: query.status.map(|word| match word {
            StatusWord::Held => order::Status::Held,
            StatusWord::Confirmed => order::Status::Confirmed,
            StatusWord::Expired => order::Status::Expired,
            StatusWord::Cancelled => order::Status::Cancelled,
            StatusWord::Refunded => order::Status::Refunded,
        }),
        after: page.after.map(OrderId),
        limit: page.rows(),
    };
    let rows = shop
        .stored_orders(query.sale_id.map(SaleId), filter)
        .await?;
    let page = page.page(
        rows,
        |(order, _)| order.id.0,
        |(order, sale)| Order::new(&order, &sale, true),
    );
    Ok(([(CACHE_CONTROL, NO_STORE)], axum::Json(page)).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::problem::Retry;

    /// Every refusal, from a script and from memory: code, status and what a client may retry.
    #[test]
    fn only_a_script_that_looked_the_key_up_says_never() {
        let opens_at_ms = 5_000;
        for (refusal, code, status, looked_up, from_memory) in [
            (
                Refusal::Mismatch,
                Code::IdempotencyKeyMismatch,
                422,
                Retry::Never,
                Retry::Never,
            ),
            (
                Refusal::NotOpen { opens_at_ms },
                Code::NotOpen,
                409,
                Retry::After,
                Retry::After,
            ),
            (
                Refusal::Paused,
                Code::Paused,
                409,
                Retry::After,
                Retry::After,
            ),
            (
                Refusal::Closed,
                Code::Closed,
                409,
                Retry::Never,
                Retry::SameKey,
            ),
            (
                Refusal::OrderLimit { limit: 2, held: 1 },
                Code::OrderLimit,
                422,
                Retry::Never,
                Retry::SameKey,
            ),
            (
                Refusal::BuyerLimit { limit: 2, held: 1 },
                Code::BuyerLimit,
                409,
                Retry::Never,
                Retry::SameKey,
            ),
            (
                Refusal::SoldOut,
                Code::SoldOut,
                409,
                Retry::Never,
                Retry::SameKey,
            ),
            (
                Refusal::Insufficient { remaining: 1 },
                Code::Insufficient,
                409,
                Retry::Never,
                Retry::SameKey,
            ),
        ] {
            for (asked, retry) in [(true, looked_up), (false, from_memory)] {
                let decision = Decision::Refused(refusal);
                let answer = Answer {
                    decision,
                    looked_up: asked,
                    now_ms: 3_000,
                };
                let problem = refuse(refusal, &answer);
                assert_eq!(
                    (problem.code(), problem.status().as_u16(), problem.retry()),
                    (code, status, retry),
                    "{refusal:?}"
                );
            }
        }
    }
}
