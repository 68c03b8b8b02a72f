//! Paying for orders, giving money back, and what gateways have to say.

use std::{slice, sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Json, Nothing, Path, Raw},
    caller::{Caller, Operator},
    check::{Check, Price, Timestamp, present},
    idempotency::IdempotencyKey,
    orders::OrderView,
    problem::{Code, FieldError, Problem},
    routes::{Access, Routes},
};
use crate::{
    domain::{
        id::{BuyerId, OrderId, PaymentId},
        limits::BUYER_LIMIT_MAX,
        money::Money,
        order::Status,
        payment::{Action, Decline, Gateway, State as PaymentState},
    },
    payments::{Sandbox, Unverified},
    sales::{self, Paid, Shop, Till},
    store::payments::Payment,
};

const METHOD_BYTES: std::ops::RangeInclusive<usize> = 1..=255;
const REASON_CHARACTERS: std::ops::RangeInclusive<usize> = 1..=1_000;

/// Why an order, or a checkout, is not paid.
pub(super) const PAYING: &[Code] = &[
    Code::NotFound,
    Code::Conflict,
    Code::HoldExpired,
    Code::PaymentDeclined,
    Code::GatewayUnavailable,
    Code::IdempotencyKeyMissing,
    Code::IdempotencyKeyMismatch,
];

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(Access::Caller, routes!(pay), PAYING)
        .add(
            Access::Caller,
            routes!(extend),
            &[
                Code::NotFound,
                Code::Conflict,
                Code::HoldExpired,
                Code::Validation,
            ],
        )
        .add(
            Access::Operator,
            routes!(refund),
            &[
                Code::NotFound,
                Code::Conflict,
                Code::IdempotencyKeyMissing,
                Code::IdempotencyKeyMismatch,
            ],
        )
        .add(
            Access::Anyone,
            routes!(webhook),
            &[Code::WebhookInvalid, Code::PayloadTooLarge],
        )
        .add(Access::Caller, routes!(decide), &[Code::Conflict])
}

/// How to pay.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PayRequest {
    /// The gateway's token of what the buyer pays with (Stripe: `pm_…`; PayPal: `paypal`; the
    /// sandbox: one of its magic words). Absent where no money is asked for.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, min_length = 1, max_length = 255, example = "sandbox_ok")]
    payment_method: Option<String>,
}

impl PayRequest {
    /// What the buyer pays with, if it can be any.
    pub(super) fn method(self) -> Result<Option<String>, Problem> {
        let mut check = Check::new();
        if let Some(method) = &self.payment_method {
            let plain = method.bytes().all(|byte| byte.is_ascii_graphic());
            if !plain || !METHOD_BYTES.contains(&method.len()) {
                check.refuse(
                    "#/payment_method",
                    "must be 1 to 255 visible ASCII characters",
                );
            }
        }
        check.done().map(|()| self.payment_method)
    }
}

/// What to give back.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RefundRequest {
    /// Units; all that are left if absent.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = i64, required = false, minimum = 1, maximum = 1_000_000)]
    quantity: Option<i64>,
    /// For the books.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, min_length = 1, max_length = 1_000)]
    reason: Option<String>,
}

/// What the buyer says to a toy bank.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Decision {
    /// Whether to pay.
    approve: bool,
}

/// A payment as it stands.
#[derive(Serialize, ToSchema)]
pub(super) struct PaymentView {
    id: Uuid,
    #[schema(inline)]
    gateway: Gateway,
    /// `captured`: the money is taken. `capturing`: the order is confirmed, and the money is about
    /// to be taken. `releasing`, `voided`: nothing was or will be taken.
    #[schema(inline)]
    state: PaymentState,
    /// What the buyer is asked for.
    #[schema(value_type = Price)]
    amount: Money,
    /// What was taken, minor units.
    captured: i64,
    /// What was given back.
    refunded: i64,
    /// What is still to be given back: the gateway is asked until it has.
    refund_due: i64,
    /// Why the bank said no.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(inline)]
    decline: Option<Decline>,
    /// What the buyer has to do, while `state` is `requires_action`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(inline)]
    action: Option<Action>,
    updated_at: Timestamp,
}

impl PaymentView {
    pub(super) fn new(payment: &Payment) -> Self {
        let PaymentId(id) = payment.id;
        Self {
            id,
            gateway: payment.gateway,
            state: payment.course.state,
            amount: payment.money,
            captured: payment.course.captured,
            refunded: payment.course.refunded,
            refund_due: payment.course.refund_due,
            decline: payment.decline,
            action: payment.action.clone(),
            updated_at: Timestamp(payment.updated_at),
        }
    }
}

/// Pay for an order
///
/// While it is held. The money is reserved, the order confirmed, and only then the money taken: an
/// order that expires meanwhile costs nothing. 202: the buyer has something to do (`payment.action`)
/// or the bank thinks; look at the order again, or send the same request with the same key. After a
/// decline another method needs another key.
#[utoipa::path(post, path = "/v1/orders/{id}/pay", tag = "payments", request_body = PayRequest,
    params(("id" = Uuid, Path), ("Idempotency-Key" = String, Header, description = "1 to 255 visible ASCII characters")),
    responses((status = 200, description = "The order is confirmed", body = OrderView),
              (status = 202, description = "Not yet", body = OrderView)))]
async fn pay(
    Caller(caller): Caller,
    State(till): State<Arc<Till>>,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    key: IdempotencyKey,
    Json(request): Json<PayRequest>,
) -> Result<Response, Problem> {
    let method = request.method()?;
    let paid = till
        .pay(OrderId(id), BuyerId(caller.user), &key.0, method)
        .await?;
    let lapsed = match paid.order.order.status {
        Status::Expired => vec![OrderId(id)],
        _ => vec![],
    };
    let status = match &paid.payment {
        Some(payment) => settled(payment, slice::from_ref(&paid.order), &lapsed)?,
        None => StatusCode::OK,
    };
    Ok((status, axum::Json(shown(&paid, &shop))).into_response())
}

/// Extend the hold of an order
///
/// For whoever is about to pay: the order is held for as long again, counted from now. Once in its
/// life; doing it twice is doing it once.
#[utoipa::path(post, path = "/v1/orders/{id}/extend", tag = "payments", params(("id" = Uuid, Path)),
    responses((status = 200, description = "The order", body = OrderView)))]
async fn extend(
    Caller(caller): Caller,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    _: Option<Json<Nothing>>,
) -> Result<axum::Json<OrderView>, Problem> {
    let view = shop.extend_hold(OrderId(id), BuyerId(caller.user)).await?;
    Ok(axum::Json(OrderView::new(&view, &shop.receipts)))
}

/// The order with its payment.
fn shown(paid: &Paid, shop: &Shop) -> OrderView {
    OrderView::with_payment(&paid.order, paid.payment.as_ref(), &shop.receipts)
}

/// What an answer about this payment of these orders says; some may have expired.
pub(super) fn settled(
    payment: &Payment,
    orders: &[sales::OrderView],
    lapsed: &[OrderId],
) -> Result<StatusCode, Problem> {
    let held = |view: &&sales::OrderView| view.order.status == Status::Held;
    let lacks = |problem: Problem| {
        let mut problem = problem.fact("payment_state", payment.course.state.as_str());
        let held = orders.iter().filter(held);
        if let Some(until_ms) = held.filter_map(|view| view.order.hold_until_ms()).min() {
            problem = problem.fact("held_until", Timestamp::from_ms(until_ms).to_string());
        }
        match orders {
            [view] => problem.fact("order_status", view.order.status.as_str()),
            _ => problem,
        }
    };
    match payment.course.state {
        PaymentState::Captured | PaymentState::Capturing | PaymentState::Refunded => {
            Ok(StatusCode::OK)
        }
        PaymentState::RequiresAction | PaymentState::Pending => Ok(StatusCode::ACCEPTED),
        PaymentState::Declined
        | PaymentState::Voided
        | PaymentState::Releasing
        | PaymentState::Revoking => Err(match payment.decline {
            Some(why) => {
                let detail = "The bank did not pay. Nothing was taken.";
                lacks(Problem::new(Code::PaymentDeclined, detail)).fact("decline", why.as_str())
            }
            None if !lapsed.is_empty() => lacks(expired(lapsed)),
            None if orders.iter().any(|view| held(&view)) => {
                let detail =
                    "The gateway's answer is not to be believed, and the payment was let go.";
                lacks(Problem::new(Code::PaymentDeclined, detail))
            }
            None => lacks(Problem::new(Code::Conflict, "The order was given back.")),
        }),
        PaymentState::Created | PaymentState::Authorised => {
            let detail = "The gateway does not answer. What became of the payment is not known yet; \
                          nothing is taken for an order that is not confirmed.";
            Err(lacks(Problem::new(Code::GatewayUnavailable, detail)).after(Duration::from_secs(1)))
        }
    }
}

/// These orders were not paid in time.
pub(super) fn expired(orders: &[OrderId]) -> Problem {
    let detail = "What `order_ids` names was not paid in time, and its units went back. Nothing was \
                  taken.";
    let ids: Vec<_> = orders.iter().map(|OrderId(id)| id.to_string()).collect();
    Problem::new(Code::HoldExpired, detail).fact("order_ids", ids)
}

/// Refund an order
///
/// All of it, or some units. The units go back on sale if the sale says so, then the money goes back;
/// `payment.refund_due` says what is still on its way.
#[utoipa::path(post, path = "/v1/orders/{id}/refund", tag = "payments", request_body = RefundRequest,
    params(("id" = Uuid, Path), ("Idempotency-Key" = String, Header, description = "1 to 255 visible ASCII characters")),
    responses((status = 200, description = "The order", body = OrderView)))]
async fn refund(
    Operator(operator): Operator,
    State(till): State<Arc<Till>>,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    key: IdempotencyKey,
    Json(request): Json<RefundRequest>,
) -> Result<axum::Json<OrderView>, Problem> {
    let mut check = Check::new();
    let quantity = request
        .quantity
        .map(|units| check.units("#/quantity", units, 1..=BUYER_LIMIT_MAX));
    let reason = request
        .reason
        .as_ref()
        .map(|reason| check.text("#/reason", reason, REASON_CHARACTERS));
    check.done()?;
    let paid = till
        .refund(OrderId(id), operator.user, &key.0, quantity, reason)
        .await?;
    Ok(axum::Json(shown(&paid, &shop)))
}

/// Tell of an event
///
/// For gateways. What is signed by the gateway and fresh is stored, and answered at once; the same
/// event again changes nothing. What it says is not believed: the gateway is asked.
#[utoipa::path(post, path = "/v1/webhooks/{gateway}", tag = "payments",
    params(("gateway" = String, Path, description = "stripe, paypal or sandbox")),
    responses((status = 204, description = "Stored")))]
async fn webhook(
    State(till): State<Arc<Till>>,
    Path(gateway): Path<String>,
    headers: HeaderMap,
    Raw(body): Raw,
) -> Result<StatusCode, Problem> {
    let gateway = Gateway::parse(&gateway)
        .filter(|gateway| till.gateways.of(*gateway).is_some())
        .ok_or_else(|| Problem::new(Code::WebhookInvalid, "There is no such gateway here."))?;
    match till.webhook(gateway, &headers, &body).await {
        Ok(_) => Ok(StatusCode::NO_CONTENT),
        // Not so much as why: it does not help whoever forges.
        Err(error @ (Unverified::Forged(_) | Unverified::Unreadable(_))) => {
            tracing::warn!(%gateway, %error, "a webhook is not to be believed");
            let detail = "The webhook is not signed by the gateway, is too old, or is no event.";
            Err(Problem::new(Code::WebhookInvalid, detail))
        }
        Err(Unverified::Later(why)) => {
            tracing::warn!(%gateway, why, "a webhook could not be verified or stored");
            Err(Problem::unavailable(
                "The webhook could not be verified or stored: send it again.",
            ))
        }
    }
}

/// Answer the toy bank
///
/// Says yes or no to a payment of the sandbox that asks for it. Whoever pays with real money does
/// that at the gateway.
#[utoipa::path(post, path = "/v1/sandbox/{reference}", tag = "payments", request_body = Decision,
    params(("reference" = String, Path, description = "The last part of `payment.action.redirect_url`")),
    responses((status = 204, description = "Decided")))]
async fn decide(
    _: Caller,
    State(sandbox): State<Option<Arc<Sandbox>>>,
    State(till): State<Arc<Till>>,
    Path(reference): Path<String>,
    Json(decision): Json<Decision>,
) -> Result<StatusCode, Problem> {
    let decided = match sandbox {
        Some(sandbox) => sandbox.decide(&reference, decision.approve).await?,
        None => false,
    };
    if decided {
        till.due.notify_one();
        Ok(StatusCode::NO_CONTENT)
    } else {
        let detail = "There is no such payment, or nothing to decide any more.";
        Err(Problem::new(Code::Conflict, detail))
    }
}

/// A request whose method does not fit the sale.
pub(super) fn method(detail: &'static str) -> Problem {
    Problem::out_of_range(vec![FieldError::new("#/payment_method", detail)])
}
