//! Checkouts as they stand, and one payment for all orders of one.

use std::sync::Arc;

use axum::{
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use futures::future::try_join_all;
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Json, Path},
    caller::Caller,
    idempotency::IdempotencyKey,
    orders::{OrderView, sees},
    payments::{PAYING, PayRequest, PaymentView, settled},
    problem::{Code, Problem},
    routes::{Access, Routes},
};
use crate::{
    domain::{id::BuyerId, payment::Gateway},
    sales::{self, Checkouts, SaleError, Till},
    store::carts::CheckoutState,
};

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(Access::Caller, routes!(get_checkout), &[Code::NotFound])
        .add(Access::Caller, routes!(pay_checkout), PAYING)
}

/// How far a checkout has come.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum CheckoutWord {
    /// It is being decided: ask again.
    Pending,
    /// All of its orders are there.
    Accepted,
    /// Nothing of it was bought.
    Failed,
}

/// A checkout as it stands.
#[derive(Serialize, ToSchema)]
struct CheckoutView {
    id: Uuid,
    #[schema(inline)]
    state: CheckoutWord,
    /// One for each line of the cart, in its order, each with its payment. Empty unless `state` is
    /// `accepted`.
    orders: Vec<OrderView>,
    /// The payment, when one pays for all orders that are or were paid; absent when they are paid
    /// one by one, and before.
    #[serde(skip_serializing_if = "Option::is_none")]
    payment: Option<PaymentView>,
    /// Why nothing was bought, line by line, if `state` is `failed`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Object>>)]
    lines: Option<Value>,
}

impl CheckoutView {
    async fn of(view: &sales::CheckoutView, till: &Till) -> Result<Self, SaleError> {
        let payments = view.orders.iter().map(|order| till.payment(order));
        let payments = try_join_all(payments).await?;
        let mut paid = payments.iter().flatten();
        let one = paid
            .next()
            .filter(|one| paid.all(|other| other.id == one.id));
        let orders = view.orders.iter().zip(&payments).map(|(order, payment)| {
            OrderView::with_payment(order, payment.as_ref(), &till.shop.receipts)
        });
        let (state, lines) = match &view.checkout.state {
            CheckoutState::Pending => (CheckoutWord::Pending, None),
            CheckoutState::Accepted => (CheckoutWord::Accepted, None),
            CheckoutState::Failed(lines) => (CheckoutWord::Failed, Some(lines.clone())),
        };
        Ok(Self {
            id: view.checkout.id,
            state,
            orders: orders.collect(),
            payment: one.map(PaymentView::new),
            lines,
        })
    }
}

/// Get a checkout
///
/// With its orders and their payment as they are now.
#[utoipa::path(get, path = "/v1/checkouts/{id}", tag = "cart",
    params(("id" = Uuid, Path)),
    responses((status = 200, description = "The checkout", body = CheckoutView)))]
async fn get_checkout(
    Caller(caller): Caller,
    State(checkouts): State<Checkouts>,
    State(till): State<Arc<Till>>,
    Path(id): Path<Uuid>,
) -> Result<axum::Json<CheckoutView>, Problem> {
    let view = checkouts.view(id, sees(&caller)).await?;
    Ok(axum::Json(CheckoutView::of(&view, &till).await?))
}

/// Pay for a checkout
///
/// One payment for all of its orders that are held; what is confirmed already is no part of it. All
/// of them are paid or none: when one has expired, `hold_expired` names it and nothing is taken; the
/// others may still be paid one by one. Orders of several gateways or currencies are refused, and
/// `lines` says which. 202, and everything else, as for one order.
#[utoipa::path(post, path = "/v1/checkouts/{id}/pay", tag = "payments",
    request_body = PayRequest,
    params(("id" = Uuid, Path), ("Idempotency-Key" = String, Header, description = "1 to 255 visible ASCII characters")),
    responses((status = 200, description = "The orders are confirmed", body = CheckoutView),
              (status = 202, description = "Not yet", body = CheckoutView)))]
async fn pay_checkout(
    Caller(caller): Caller,
    State(checkouts): State<Checkouts>,
    State(till): State<Arc<Till>>,
    Path(id): Path<Uuid>,
    key: IdempotencyKey,
    Json(request): Json<PayRequest>,
) -> Result<Response, Problem> {
    let method = request.method()?;
    let buyer = BuyerId(caller.user);
    let view = checkouts.view(id, Some(buyer)).await?;
    let refuse = |detail| Err(Problem::new(Code::Conflict, detail));
    match view.checkout.state {
        CheckoutState::Accepted => {}
        CheckoutState::Pending => return refuse("The checkout is still being decided."),
        CheckoutState::Failed(_) => return refuse("Nothing of this checkout was bought."),
    }
    let paid = till
        .pay_checkout(id, &view.orders, buyer, &key.0, method)
        .await?;
    let status = match &paid.payment {
        Some(payment) => settled(payment, &paid.orders, &paid.lapsed)?,
        None => StatusCode::OK,
    };
    let view = sales::CheckoutView {
        orders: paid.orders,
        ..view
    };
    let mut body = CheckoutView::of(&view, &till).await?;
    if let Some(payment) = &paid.payment {
        body.payment = Some(PaymentView::new(payment));
    }
    Ok((status, axum::Json(body)).into_response())
}

/// Orders that one payment cannot pay for.
pub(super) fn unlike(orders: &[sales::OrderView]) -> Problem {
    let lines = orders.iter().map(|view| {
        json!({
            "order_id": view.order.id.0,
            "sale_id": view.sale.id.0,
            "payment": view.sale.payment.map_or("none", Gateway::as_str),
            "currency": view.order.unit_price.currency.as_str(),
        })
    });
    let detail = "One payment takes one gateway and one currency, and an amount within bounds: pay \
                  the orders in `lines` one by one.";
    Problem::new(Code::Conflict, detail).fact("lines", lines.collect::<Vec<_>>())
}
