//! The leaderboard: who bought, in order of purchase.

use std::sync::Arc;

use axum::{
    extract::State,
    http::header::CACHE_CONTROL,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Path, Query},
    check::Timestamp,
    page::{Page, Pagination},
    problem::{Code, Problem},
    routes::{Access, Routes},
    sales::NO_STORE,
};
use crate::{domain::id::SaleId, sales::Shop};

pub(super) fn routes() -> Routes {
    Routes::new().add(
        Access::Anyone,
        routes!(leaderboard),
        &[Code::NotFound, Code::Validation],
    )
}

/// A confirmed order's place.
#[derive(Serialize, ToSchema)]
struct Place {
    /// 1, 2, 3 …: it changes when somebody ahead cancels.
    rank: u64,
    /// A pseudonym of the buyer, for this sale only.
    buyer: String,
    quantity: u64,
    accepted_at: Timestamp,
    /// Never changes.
    seq: u64,
}

/// Which places to list.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct LeaderboardQuery {
    /// Which round; the current one if absent.
    round: Option<u32>,
    /// Places on a page, 20 if absent.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<i64>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

/// List who bought, in order of purchase
#[utoipa::path(get, path = "/v1/sales/{id}/leaderboard", tag = "sales",
    params(("id" = Uuid, Path), LeaderboardQuery),
    responses((status = 200, description = "A page", body = Page<Place>)))]
async fn leaderboard(
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    Query(query): Query<LeaderboardQuery>,
) -> Result<Response, Problem> {
    let page = Pagination::<u64>::read(query.limit, query.cursor.as_deref())?;
    let rows = usize::try_from(page.rows()).map_err(Problem::internal)?;
    let after = page.after.unwrap_or(0);
    let (places, sale) = shop
        .leaderboard(SaleId(id), query.round, after, rows)
        .await?;
    let ranked = (places.before + 1..).zip(places.orders).collect();
    let page = page.page(
        ranked,
        |(_, order)| order.seq,
        |(rank, order)| Place {
            rank,
            buyer: shop.pseudonyms.of(sale.id, order.buyer),
            quantity: order.quantity,
            accepted_at: Timestamp::from_ms(order.accepted_at_ms),
            seq: order.seq,
        },
    );
    Ok(([(CACHE_CONTROL, NO_STORE)], axum::Json(page)).into_response())
}
