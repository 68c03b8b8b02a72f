//! Who bought, in order of purchase, under names that lead nowhere.

use std::sync::Arc;

use axum::extract::State;
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
};
use crate::{domain::id::SaleId, sales::Shop};

pub(super) fn routes() -> Routes {
    Routes::new().add(
        Access::Anyone,
        routes!(list),
        &[Code::NotFound, Code::Validation],
    )
}

/// A confirmed order.
#[derive(Serialize, ToSchema)]
struct Entry {
    /// 1 is who bought first. It falls when somebody before cancels.
    rank: u64,
    /// What the buyer is called in this sale.
    #[schema(example = "kx0Zq3mJ7vYtR2aB")]
    buyer: String,
    quantity: u64,
    accepted_at: Timestamp,
    /// The place of the acceptance among the events of the round. It never changes.
    seq: u64,
}

/// Which entries to list.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct LeaderboardQuery {
    /// Of which running of the sale; the present one if absent.
    #[param(minimum = 1)]
    round: Option<u32>,
    /// Entries on a page, 20 if absent.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<i64>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

/// Where a page ends. It keeps to its round when the next one begins meanwhile.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Place {
    round: u32,
    seq: u64,
}

/// Show the leaderboard
///
/// One entry for each confirmed order, at the place of its acceptance.
#[utoipa::path(get, path = "/v1/sales/{id}/leaderboard", tag = "leaderboard",
    params(("id" = Uuid, Path), LeaderboardQuery),
    responses((status = 200, description = "A page", body = Page<Entry>)))]
async fn list(
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    Query(query): Query<LeaderboardQuery>,
) -> Result<axum::Json<Page<Entry>>, Problem> {
    let page = Pagination::<Place>::read(query.limit, query.cursor.as_deref())?;
    let after = page.after;
    if let (Some(after), Some(round)) = (after, query.round)
        && after.round != round
    {
        return Err(Pagination::<Place>::bad_cursor());
    }
    let round = query.round.or(after.map(|after| after.round));
    let after_seq = after.map_or(0, |after| after.seq);
    let rows = usize::try_from(page.rows()).map_err(Problem::internal)?;
    let (board, sale) = shop.leaderboard(SaleId(id), round, after_seq, rows).await?;
    let place = |(_, order): &(u64, crate::domain::order::Order)| Place {
        round: order.round.round,
        seq: order.seq,
    };
    let ranked = (board.before + 1..).zip(board.orders).collect();
    Ok(axum::Json(page.page(ranked, place, |(rank, order)| {
        Entry {
            rank,
            buyer: shop.pseudonyms.of(sale.id, order.buyer),
            quantity: order.quantity,
            accepted_at: Timestamp::from_ms(order.accepted_at_ms),
            seq: order.seq,
        }
    })))
}
