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
    hurdles::Proofs,
    idempotency::{IDEMPOTENCY_REPLAYED, IdempotencyKey, REPLAYED},
    page::{Page, Pagination},
    payments::PaymentView,
    problem::{Code, Problem},
    routes::{Access, Noted, Routes},
};
use crate::{
    auth::token::Identity,
    domain::{
        id::{BuyerId, OrderId, SaleId},
        limits::BUYER_LIMIT_MAX,
        money::Money,
        order::{Decision, Durability, Order, Refusal, Status},
        receipt::ReceiptKeys,
    },
    engine::Answer,
    faults,
    sales::{self, Shop, Till},
    store::{orders::Filter, payments::Payment, sales::SaleFacts},
};

/// Room for a 201, so that it is written without growing.
const BODY_BYTES: usize = 768;

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(
            Access::Caller,
            routes!(purchase),
            &[
                Code::NotFound,
                Code::IdempotencyKeyMissing,
                Code::IdempotencyKeyMismatch,
                Code::AccountTooYoung,
                Code::ProofRequired,
                Code::ProofInvalid,
                Code::NotOpen,
                Code::Paused,
                Code::Closed,
                Code::OrderLimit,
                Code::BuyerLimit,
                Code::SoldOut,
                Code::Insufficient,
                Code::NotDurable,
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
        .noting(Noted::OfOperators)
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
pub(super) struct OrderBody {
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
    /// Until when it waits for its payment, if it does: then it expires, and its units are for sale
    /// again. As the answer to a purchase it is the first deadline.
    #[serde(skip_serializing_if = "Option::is_none")]
    held_until: Option<Timestamp>,
    /// What the acceptance survives.
    durability: Durability,
    /// The signed proof of the acceptance. Keep it: should the store that decides ever lose the
    /// order, the receipt gets it back. Absent from orders that are older than receipts, and from
    /// lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "v1.1.AZrHQ….k3Jw…")]
    receipt: Option<String>,
}

impl OrderBody {
    /// As the answer to an acceptance, with its receipt: the same every time.
    pub(super) fn of_acceptance(
        order: &Order,
        sale: &SaleFacts,
        receipts: &ReceiptKeys,
    ) -> Result<Self, Problem> {
        // Without the receipt the bytes would be others: the order is there, and its answer is not.
        let receipt = receipts.sign(sale.id, order).map_err(|error| {
            let detail = "The order is there, but the key of its receipt is not.";
            Problem::unknown(detail, Duration::from_secs(1)).caused_by(error)
        })?;
        Ok(Self::new(order, sale, receipt))
    }

    fn new(order: &Order, sale: &SaleFacts, receipt: Option<String>) -> Self {
        Self {
            id: order.id.0,
            sale_id: sale.id.0,
            round: order.round.round,
            buyer_id: order.buyer.0,
            quantity: order.quantity,
            unit_price: order.unit_price,
            total: order.total(),
            status: order.status,
            seq: order.seq,
            accepted_at: Timestamp::from_ms(order.accepted_at_ms),
            held_until: (order.status == Status::Held)
                .then(|| order.hold_until_ms().map(Timestamp::from_ms))
                .flatten(),
            durability: order.durability,
            receipt,
        }
    }
}

/// An order as it is now.
#[derive(Serialize, ToSchema)]
pub(super) struct OrderView {
    #[serde(flatten)]
    body: OrderBody,
    /// Units that went back on sale, if any did.
    #[serde(skip_serializing_if = "Option::is_none")]
    returned: Option<u64>,
    /// Units that were refunded and stay sold, if any were.
    #[serde(skip_serializing_if = "Option::is_none")]
    refunded: Option<u64>,
    /// Whether PostgreSQL has it. Accepted it is either way.
    stored: bool,
    /// How it is paid: the payment that may confirm it or has, else the last try. Absent from lists,
    /// and where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    payment: Option<PaymentView>,
}

impl OrderView {
    /// With its receipt, if its key is there: unlike a replay, a view need not always be the same.
    pub(super) fn new(view: &sales::OrderView, receipts: &ReceiptKeys) -> Self {
        let sales::OrderView {
            order,
            sale,
            stored,
        } = view;
        let receipt = receipts.sign(sale.id, order).unwrap_or_default();
        Self {
            body: OrderBody::new(order, sale, receipt),
            returned: some(order.returned),
            refunded: some(order.refunded),
            stored: *stored,
            payment: None,
        }
    }

    /// The same, with its payment.
    pub(super) fn with_payment(
        view: &sales::OrderView,
        payment: Option<&Payment>,
        receipts: &ReceiptKeys,
    ) -> Self {
        Self {
            payment: payment.map(PaymentView::new),
            ..Self::new(view, receipts)
        }
    }
}

/// Units, if there are any.
fn some(units: u64) -> Option<u64> {
    Some(units).filter(|units| *units > 0)
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
    params(("id" = Uuid, Path), ("Idempotency-Key" = String, Header, description = "1 to 255 visible ASCII characters"),
        ("Proof-Of-Work" = Option<String>, Header, description = "The solved challenge, if the sale has `proof_of_work_bits`")),
    responses((status = 201, description = "The order", body = OrderBody)))]
async fn purchase(
    Caller(caller): Caller,
    State(shop): State<Arc<Shop>>,
    Path(sale): Path<Uuid>,
    key: IdempotencyKey,
    proofs: Proofs,
    Json(purchase): Json<Purchase>,
) -> Result<Response, Problem> {
    let quantity = purchase.check()?;
    let (answer, sale) = shop
        .purchase(SaleId(sale), proofs.of(&caller), &key.0, quantity)
        .await?;
    match answer.decision {
        Decision::Accepted(order) => accepted(&order, &sale, &shop.receipts, false),
        Decision::Replayed(order) => accepted(&order, &sale, &shop.receipts, true),
        Decision::Refused(refusal) => Err(refused(refusal, &answer)),
    }
}

/// The 201 of an acceptance, from the order alone: the same bytes every time.
pub(super) fn accepted(
    order: &Order,
    sale: &SaleFacts,
    receipts: &ReceiptKeys,
    replayed: bool,
) -> Result<Response, Problem> {
    let mut body = Vec::with_capacity(BODY_BYTES);
    let told = if faults::bug("replay_tells_present_status") {
        *order
    } else {
        order.as_accepted()
    };
    let order_body = OrderBody::of_acceptance(&told, sale, receipts)?;
    serde_json::to_writer(&mut body, &order_body).map_err(Problem::internal)?;
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
pub(super) fn refused(refusal: Refusal, answer: &Answer) -> Problem {
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
        // The shop answers it from PostgreSQL.
        Refusal::Archived { .. } => {
            return Problem::internal("a purchase was left at the archive");
        }
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
        // A purchase is one line.
        Refusal::LeftOut => return Problem::internal("a purchase was left out of a cart"),
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
pub(super) fn sees(caller: &Identity) -> Option<BuyerId> {
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
    State(till): State<Arc<Till>>,
    Path(id): Path<Uuid>,
) -> Result<axum::Json<OrderView>, Problem> {
    let view = shop.order(OrderId(id), sees(&caller)).await?;
    let payment = till.payment(&view).await?;
    let view = OrderView::with_payment(&view, payment.as_ref(), &shop.receipts);
    Ok(axum::Json(view))
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
    let view = |(order, sale): (Order, Arc<SaleFacts>)| OrderView {
        returned: some(order.returned),
        refunded: some(order.refunded),
        body: OrderBody::new(&order, &sale, None),
        stored: true,
        payment: None,
    };
    Ok(axum::Json(page.page(rows, |(order, _)| order.id, view)))
}

/// Cancel an order
///
/// Its units are for sale again, and what was paid for it goes back. Doing it twice is doing it once.
#[utoipa::path(post, path = "/v1/orders/{id}/cancel", tag = "orders", params(("id" = Uuid, Path)),
    responses((status = 200, description = "The order", body = OrderView)))]
async fn cancel(
    Caller(caller): Caller,
    State(shop): State<Arc<Shop>>,
    State(till): State<Arc<Till>>,
    Path(id): Path<Uuid>,
    _: Option<Json<Nothing>>,
) -> Result<axum::Json<OrderView>, Problem> {
    let sales::Paid {
        order: view,
        payment,
    } = till.cancel(OrderId(id), sees(&caller), caller.user).await?;
    match view.order.status {
        Status::Cancelled => {
            let view = OrderView::with_payment(&view, payment.as_ref(), &shop.receipts);
            Ok(axum::Json(view))
        }
        Status::Held
        | Status::Confirmed
        | Status::Expired
        | Status::Refunded
        | Status::Withdrawn => {
            let detail = format!("The order is {}.", view.order.status.as_str());
            Err(Problem::new(Code::Conflict, detail))
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::{
        Router,
        body::Body,
        http::{Request, header::RETRY_AFTER},
        routing::post,
    };
    use serde_json::{Value, json};

    use super::{
        super::tests::{Answer as Response, edged},
        *,
    };
    use crate::{engine::EngineError, sales::SaleError};

    const NOW_MS: i64 = 1_764_000_000_000;

    /// The answer of a handler that refuses like this.
    async fn answer(problem: Problem) -> Response {
        let handler = async move || -> Result<(), Problem> { Err(problem) };
        let router = edged(Router::new().route("/", post(handler)));
        Response::of(router, Request::post("/").body(Body::empty()).unwrap()).await
    }

    /// Asserts all that a client acts on.
    fn asserts(answer: &Response, status: u16, retry: &str, outcome: &str, wait: Option<&str>) {
        let body = &answer.body;
        assert_eq!(answer.status.as_u16(), status, "{body}");
        assert_eq!(
            (&body["retry"], &body["outcome"]),
            (&retry.into(), &outcome.into()),
            "{body}"
        );
        let header = answer
            .headers
            .get(RETRY_AFTER)
            .map(|value| value.to_str().unwrap());
        assert_eq!(header, wait, "{body}");
    }

    #[tokio::test]
    async fn every_refusal_says_what_a_retry_is_worth() {
        let not_open = Refusal::NotOpen {
            opens_at_ms: NOW_MS + 1_001,
        };
        let opening = json!({"opens_at": "2025-11-24T16:00:01.001Z", "starts_in_ms": 1_001});
        let order_limit = Refusal::OrderLimit { limit: 2, held: 1 };
        let buyer_limit = Refusal::BuyerLimit { limit: 3, held: 2 };
        let insufficient = Refusal::Insufficient { remaining: 4 };
        let none = json!({});
        for (refusal, code, status, seen, unseen, wait, facts) in [
            (
                Refusal::Mismatch,
                "idempotency_key_mismatch",
                422,
                "never",
                "never",
                None,
                &none,
            ),
            (
                not_open,
                "not_open",
                409,
                "after",
                "after",
                Some("2"),
                &opening,
            ),
            (
                Refusal::Paused,
                "paused",
                409,
                "after",
                "after",
                Some("1"),
                &none,
            ),
            (
                Refusal::Closed,
                "closed",
                409,
                "never",
                "same_key",
                None,
                &none,
            ),
            (
                order_limit,
                "order_limit",
                422,
                "never",
                "same_key",
                None,
                &json!({"limit": 2, "held": 1}),
            ),
            (
                buyer_limit,
                "buyer_limit",
                409,
                "never",
                "same_key",
                None,
                &json!({"limit": 3, "held": 2}),
            ),
            (
                Refusal::SoldOut,
                "sold_out",
                409,
                "never",
                "same_key",
                None,
                &none,
            ),
            (
                insufficient,
                "insufficient",
                409,
                "never",
                "same_key",
                None,
                &json!({"remaining": 4}),
            ),
        ] {
            for (looked_up, retry) in [(true, seen), (false, unseen)] {
                let decided = Answer {
                    decision: Decision::Refused(refusal),
                    looked_up,
                    now_ms: NOW_MS,
                };
                let answer = answer(refused(refusal, &decided)).await;
                asserts(&answer, status, retry, "not_applied", wait);
                assert_eq!(answer.body["code"], code);
                let mut found = answer.body.as_object().unwrap().clone();
                found.retain(|name, _| {
                    ["opens_at", "starts_in_ms", "limit", "held", "remaining"]
                        .contains(&name.as_str())
                });
                assert_eq!(Value::Object(found), *facts, "{code}");
            }
        }
    }

    #[tokio::test]
    async fn a_sale_that_opens_this_very_moment_is_worth_a_second() {
        let refusal = Refusal::NotOpen {
            opens_at_ms: NOW_MS,
        };
        let decided = Answer {
            decision: Decision::Refused(refusal),
            looked_up: true,
            now_ms: NOW_MS,
        };
        let answer = answer(refused(refusal, &decided)).await;
        asserts(&answer, 409, "after", "not_applied", Some("1"));
        assert_eq!(answer.body["starts_in_ms"], 0);
    }

    #[tokio::test]
    async fn no_answer_of_a_store_is_unknown_only_if_a_script_may_run() {
        let why = || "p0".to_owned();
        for (error, status, outcome, wait) in [
            (EngineError::Overloaded(7), 503, "not_applied", "1"),
            (EngineError::Disconnected, 503, "not_applied", "1"),
            (EngineError::Fenced(why()), 503, "not_applied", "1"),
            (EngineError::Damaged(why()), 503, "not_applied", "1"),
            (EngineError::Refused(why()), 503, "not_applied", "1"),
            (EngineError::Expired, 503, "not_applied", "1"),
            (EngineError::Unknown(why()), 503, "unknown", "3"),
            (EngineError::Protocol(why()), 503, "unknown", "3"),
        ] {
            let answer = answer(Problem::from(SaleError::Engine(error))).await;
            asserts(&answer, status, "after", outcome, Some(wait));
            assert!(
                !answer.text.contains("p0") && !answer.text.contains("Redis"),
                "{}",
                answer.text
            );
        }
        // The sale is in PostgreSQL by then, whatever the engine says.
        let answer = answer(Problem::of_making(EngineError::Disconnected.into())).await;
        asserts(&answer, 503, "after", "unknown", Some("3"));
    }

    #[tokio::test]
    async fn other_errors_of_a_sale_are_final() {
        for (error, status, code, pointer) in [
            (SaleError::NotFound, 404, "not_found", None),
            (SaleError::Mismatch, 422, "idempotency_key_mismatch", None),
            (
                SaleError::NoProduct,
                422,
                "validation",
                Some("#/product_id"),
            ),
            (SaleError::TooMany, 422, "validation", Some("#/units")),
            (
                SaleError::Conflict("The sale is closed."),
                409,
                "conflict",
                None,
            ),
        ] {
            let answer = answer(Problem::of_making(error)).await;
            asserts(&answer, status, "never", "not_applied", None);
            assert_eq!(answer.body["code"], code);
            assert_eq!(answer.body["errors"][0]["pointer"].as_str(), pointer);
        }
    }

    #[tokio::test]
    async fn only_a_sensible_quantity_is_read() {
        let handler = async |Json(purchase): Json<Purchase>| {
            purchase.check().map(|quantity| quantity.to_string())
        };
        let router = edged(Router::new().route("/", post(handler)));
        let send = async |body: &str| {
            let request = Request::post("/").header(CONTENT_TYPE, "application/json");
            Response::of(
                router.clone(),
                request.body(Body::from(body.to_owned())).unwrap(),
            )
            .await
        };
        for good in ["1", "1000000"] {
            assert_eq!(send(&format!("{{\"quantity\":{good}}}")).await.text, good);
        }
        for (bad, status) in [
            ("0", 422),
            ("-1", 422),
            ("1000001", 422),
            ("1000000000", 422),
            ("9223372036854775807", 422),
            ("9223372036854775808", 400),
            ("1.5", 400),
            ("1e3", 400),
            ("\"1\"", 400),
            ("null", 400),
            ("true", 400),
            ("1, \"price\": 0", 400),
        ] {
            let answer = send(&format!("{{\"quantity\":{bad}}}")).await;
            asserts(&answer, status, "never", "not_applied", None);
            let pointer = if bad.contains("price") {
                "#/price"
            } else {
                "#/quantity"
            };
            assert_eq!(answer.body["errors"][0]["pointer"], pointer, "{bad}");
        }
    }
}
