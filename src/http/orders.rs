//! Orders: buying, looking up what was bought, giving it back.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::{
        HeaderValue, StatusCode,
        header::{CONTENT_TYPE, LOCATION},
    },
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Json, Nothing, Path, Query},
    caller::Caller,
    check::{Check, Price, Timestamp},
    idempotency::{IDEMPOTENCY_REPLAYED, IdempotencyKey, REPLAYED},
    page::{Page, Pagination},
    problem::{Code, Problem},
    routes::{Access, Routes},
};
use crate::{
    auth::token::Identity,
    domain::{
        id::{BuyerId, OrderId, SaleId},
        limits::BUYER_LIMIT_MAX,
        money::Money,
        order::{Decision, Durability, Order, Refusal, Status},
    },
    engine::Answer,
    sales::Shop,
    store::{orders::Filter, sales::SaleFacts},
};

/// Room for a 201, so that it is written without growing.
const RECEIPT_BYTES: usize = 512;

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(
            Access::Caller,
            routes!(purchase),
            &[
                Code::NotFound,
                Code::IdempotencyKeyMissing,
                Code::IdempotencyKeyMismatch,
                Code::NotOpen,
                Code::Paused,
                Code::Closed,
                Code::OrderLimit,
                Code::BuyerLimit,
                Code::SoldOut,
                Code::Insufficient,
            ],
        )
        .add(Access::Caller, routes!(get), &[Code::NotFound])
        .add(
            Access::Caller,
            routes!(list),
            &[Code::NotFound, Code::Forbidden, Code::Validation],
        )
        .add(
            Access::Caller,
            routes!(cancel),
            &[Code::NotFound, Code::Conflict, Code::Validation],
        )
}

/// What to buy.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Purchase {
    /// Units.
    #[schema(example = 1, minimum = 1, maximum = 1_000_000)]
    quantity: i64,
}

impl Purchase {
    fn check(&self) -> Result<u64, Problem> {
        let mut check = Check::new();
        let quantity = check.units("#/quantity", self.quantity, 1..=BUYER_LIMIT_MAX);
        check.done().map(|()| quantity)
    }
}

/// An accepted purchase. As the answer to a purchase it holds only what never changes again, so
/// that every retry gets the same bytes.
#[derive(Serialize, ToSchema)]
struct Receipt {
    id: Uuid,
    sale_id: Uuid,
    /// Which running of the sale it took its units from.
    round: u32,
    buyer_id: Uuid,
    quantity: u64,
    #[schema(value_type = Price)]
    unit_price: Money,
    #[schema(value_type = Price)]
    total: Money,
    status: Status,
    /// Its place among the events of its round.
    seq: u64,
    /// By the clock of the store that decides.
    accepted_at: Timestamp,
    /// What the acceptance survives.
    durability: Durability,
}

impl Receipt {
    fn new(order: &Order, sale: &SaleFacts, status: Status) -> Self {
        Self {
            id: order.id.0,
            sale_id: sale.id.0,
            round: order.round.round,
            buyer_id: order.buyer.0,
            quantity: order.quantity,
            unit_price: order.unit_price,
            total: order.total(),
            status,
            seq: order.seq,
            accepted_at: Timestamp::from_ms(order.accepted_at_ms),
            durability: order.durability,
        }
    }
}

/// An order as it is now.
#[derive(Serialize, ToSchema)]
struct OrderView {
    #[serde(flatten)]
    receipt: Receipt,
    /// Whether PostgreSQL has it. Accepted it is either way.
    stored: bool,
}

impl OrderView {
    fn new(order: &Order, sale: &SaleFacts, stored: bool) -> Self {
        Self {
            receipt: Receipt::new(order, sale, order.status),
            stored,
        }
    }
}

impl From<crate::sales::OrderView> for OrderView {
    fn from(view: crate::sales::OrderView) -> Self {
        Self::new(&view.order, &view.sale, view.stored)
    }
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
    status: Option<Status>,
    /// Only orders of this buyer. Buyers see their own, whatever they ask for.
    buyer_id: Option<Uuid>,
    /// Orders on a page, 20 if absent.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<i64>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

/// Buy
///
/// The 201 is final. A retry with the same key gets it again, byte by byte, whatever has happened
/// to the order since; a refusal leaves nothing behind.
#[utoipa::path(post, path = "/v1/sales/{id}/orders", tag = "orders", request_body = Purchase,
    params(("id" = Uuid, Path), ("Idempotency-Key" = String, Header, description = "1 to 255 visible ASCII characters")),
    responses((status = 201, description = "The order", body = Receipt)))]
async fn purchase(
    Caller(caller): Caller,
    State(shop): State<Arc<Shop>>,
    Path(sale): Path<Uuid>,
    key: IdempotencyKey,
    Json(purchase): Json<Purchase>,
) -> Result<Response, Problem> {
    let quantity = purchase.check()?;
    let (answer, sale) = shop
        .purchase(SaleId(sale), BuyerId(caller.user), &key.0, quantity)
        .await?;
    match answer.decision {
        Decision::Accepted(order) => receipt(&order, &sale, false),
        Decision::Replayed(order) => receipt(&order, &sale, true),
        Decision::Refused(refusal) => Err(refused(refusal, &answer)),
    }
}

fn receipt(order: &Order, sale: &SaleFacts, replayed: bool) -> Result<Response, Problem> {
    let mut body = Vec::with_capacity(RECEIPT_BYTES);
    serde_json::to_writer(&mut body, &Receipt::new(order, sale, order.accepted_as))
        .map_err(Problem::internal)?;
    // Hexadecimal digits and hyphens are always a header's value.
    let location =
        HeaderValue::try_from(format!("/v1/orders/{}", order.id)).map_err(Problem::internal)?;
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (LOCATION, location),
    ];
    let replayed = replayed.then_some([(IDEMPOTENCY_REPLAYED, REPLAYED)]);
    Ok((StatusCode::CREATED, replayed, headers, body).into_response())
}

/// A refusal as the client sees it. It is final for the key only if a script looked the key up,
/// and not even then if the passing of time or an operator can change it.
fn refused(refusal: Refusal, answer: &Answer) -> Problem {
    let problem = match refusal {
        Refusal::Mismatch => {
            return Problem::new(
                Code::IdempotencyKeyMismatch,
                "This key has ordered another quantity in this sale.",
            );
        }
        Refusal::NotOpen { opens_at_ms } => {
            let starts_in_ms = u64::try_from(opens_at_ms - answer.now_ms).unwrap_or(0);
            return Problem::new(Code::NotOpen, "The sale has not begun.")
                .after(Duration::from_millis(starts_in_ms.max(1)))
                .fact("opens_at", Timestamp::from_ms(opens_at_ms).to_string())
                .fact("starts_in_ms", starts_in_ms);
        }
        Refusal::Paused => return Problem::new(Code::Paused, "The sale is paused for now."),
        Refusal::Closed => Problem::new(Code::Closed, "The sale has ended."),
        Refusal::OrderLimit { limit, held } => {
            Problem::new(Code::OrderLimit, "One order may not ask for so many units.")
                .fact("limit", limit)
                .fact("held", held)
        }
        Refusal::BuyerLimit { limit, held } => {
            Problem::new(Code::BuyerLimit, "One buyer may not have so many units.")
                .fact("limit", limit)
                .fact("held", held)
        }
        Refusal::SoldOut => Problem::new(Code::SoldOut, "No unit is left."),
        Refusal::Insufficient { remaining } => {
            Problem::new(Code::Insufficient, "Fewer units are left than asked for.")
                .fact("remaining", remaining)
        }
    };
    if answer.looked_up {
        problem.looked_up()
    } else {
        problem
    }
}

/// Whose orders a caller may see; `None` sees all.
fn sees(caller: &Identity) -> Option<BuyerId> {
    (!caller.role.operates()).then_some(BuyerId(caller.user))
}

/// Get an order
///
/// At once, on every node, as soon as it is accepted.
#[utoipa::path(get, path = "/v1/orders/{id}", tag = "orders", params(("id" = Uuid, Path)),
    responses((status = 200, description = "The order", body = OrderView)))]
async fn get(
    Caller(caller): Caller,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
) -> Result<axum::Json<OrderView>, Problem> {
    let view = shop.order(OrderId(id), sees(&caller)).await?;
    Ok(axum::Json(view.into()))
}

/// List orders
///
/// A buyer's own, or an operator's choice; those that are stored, newest first.
#[utoipa::path(get, path = "/v1/orders", tag = "orders", params(OrderQuery),
    responses((status = 200, description = "A page", body = Page<OrderView>)))]
async fn list(
    Caller(caller): Caller,
    State(shop): State<Arc<Shop>>,
    Query(query): Query<OrderQuery>,
) -> Result<axum::Json<Page<OrderView>>, Problem> {
    let page = Pagination::<OrderId>::read(query.limit, query.cursor.as_deref())?;
    let asked = query.buyer_id.map(BuyerId);
    let own = sees(&caller);
    if own.is_some() && asked.is_some() && asked != own {
        let detail = "Only operators may see the orders of others.";
        return Err(Problem::new(Code::Forbidden, detail));
    }
    let filter = Filter {
        buyer: own.or(asked),
        sale: None,
        status: query.status,
        after: page.after,
        limit: page.rows(),
    };
    let rows = shop
        .stored_orders(query.sale_id.map(SaleId), filter)
        .await?;
    let view = |(order, sale): (Order, Arc<SaleFacts>)| OrderView::new(&order, &sale, true);
    Ok(axum::Json(page.page(rows, |(order, _)| order.id, view)))
}

/// Cancel an order
///
/// Its units are for sale again. Doing it twice is doing it once.
#[utoipa::path(post, path = "/v1/orders/{id}/cancel", tag = "orders", params(("id" = Uuid, Path)),
    responses((status = 200, description = "The order", body = OrderView)))]
async fn cancel(
    Caller(caller): Caller,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    _: Option<Json<Nothing>>,
) -> Result<axum::Json<OrderView>, Problem> {
    let view = shop.cancel(OrderId(id), sees(&caller), caller.user).await?;
    match view.order.status {
        Status::Cancelled => Ok(axum::Json(view.into())),
        Status::Held | Status::Confirmed | Status::Expired | Status::Refunded => {
            let detail = format!("The order is {}.", view.order.status.as_str());
            Err(Problem::new(Code::Conflict, detail))
        }
    }
}
