//! Receipts: getting back what the store that decides has lost.

use std::sync::Arc;

use axum::{
    extract::State,
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::{
    body::Json,
    caller::Caller,
    orders::{OrderBody, OrderView, accepted, refused, sees},
    problem::{Code, FieldError, Problem},
    routes::{Access, Routes},
};
use crate::{
    domain::order::Decision,
    sales::{Redemption, Shop},
};

pub(super) fn routes() -> Routes {
    Routes::new().add(
        Access::Caller,
        routes!(redeem),
        &[
            Code::Forbidden,
            Code::ReceiptInvalid,
            Code::NotRedeemable,
            Code::IdempotencyKeyMismatch,
            Code::NotOpen,
            Code::Closed,
            Code::OrderLimit,
            Code::BuyerLimit,
            Code::SoldOut,
            Code::Insufficient,
            Code::NotDurable,
        ],
    )
}

/// A receipt to redeem.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ReceiptRequest {
    /// As the 201 had it.
    #[schema(example = "v1.1.AZrHQ….k3Jw…")]
    receipt: String,
}

/// Redeem a receipt
///
/// For the buyer that it names, or an operator. An order that is there is shown, and nothing else
/// happens. One that was lost when an epoch began is accepted anew, if stock and limits allow it,
/// also while the sale is paused or closed: with a new place, and a new receipt. Doing it twice is
/// doing it once.
#[utoipa::path(post, path = "/v1/receipts", tag = "receipts", request_body = ReceiptRequest,
    responses((status = 200, description = "The order is there", body = OrderView),
              (status = 201, description = "The order was lost, and is accepted anew", body = OrderBody)))]
async fn redeem(
    Caller(caller): Caller,
    State(shop): State<Arc<Shop>>,
    Json(request): Json<ReceiptRequest>,
) -> Result<Response, Problem> {
    let receipt = shop.receipts.verify(&request.receipt).map_err(|invalid| {
        let error = FieldError::new("#/receipt", invalid.to_string());
        Problem::new(Code::ReceiptInvalid, "The receipt is not one to believe.").at(error)
    })?;
    if sees(&caller).is_some_and(|buyer| buyer != receipt.order.buyer) {
        let detail = "The receipt names another buyer.";
        return Err(Problem::new(Code::Forbidden, detail));
    }
    match shop.redeem(&receipt).await? {
        Redemption::Known(view) => {
            let view = OrderView::new(&view, &shop.receipts);
            Ok(axum::Json(view).into_response())
        }
        Redemption::Decided(answer, sale) => match answer.decision {
            Decision::Accepted(order) | Decision::Replayed(order) => {
                accepted(&order, &sale, &shop.receipts, false)
            }
            Decision::Refused(refusal) => Err(refused(refusal, &answer)),
        },
        Redemption::NotLost => Err(Problem::new(
            Code::NotRedeemable,
            "There is no such order, and no loss was reported that it could be part of.",
        )),
    }
}
