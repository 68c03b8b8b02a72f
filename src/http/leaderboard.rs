//! Who bought, in order of purchase, under names that lead nowhere.

use std::{collections::HashMap, ops::RangeInclusive, sync::Arc};

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Path, Query},
    caller::Caller,
    check::Timestamp,
    page::{Page, Pagination},
    problem::{Code, Problem},
    routes::{Access, Routes},
};
use crate::{
    domain::{
        id::{BuyerId, SaleId},
        order::Order,
    },
    engine::LeaderboardPage,
    sales::Shop,
    store::sales::SaleFacts,
};

/// Entries around the caller.
const AROUND: RangeInclusive<i64> = 1..=100;
const AROUND_DEFAULT: i64 = 21;

pub(super) fn routes() -> Routes {
    const CODES: &[Code] = &[Code::NotFound, Code::Validation];
    Routes::new()
        .add(Access::Anyone, routes!(list), CODES)
        .add(Access::Caller, routes!(me), CODES)
}

/// A confirmed order.
#[derive(Serialize, ToSchema)]
struct Entry {
    /// 1 is who bought first. It falls when somebody before cancels.
    rank: u64,
    /// What the buyer is called in this sale.
    #[schema(example = "kx0Zq3mJ7vYtR2aB")]
    buyer: String,
    /// The name that the buyer wants to be shown; most have none.
    #[schema(example = "Ada")]
    name: Option<String>,
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
    let (board, sale) = shop
        .leaderboard(SaleId(id), round, after_seq, 0, rows)
        .await?;
    let names = shop.names.of(&buyers(&board)).await;
    let place = |(_, order): &(u64, Order)| Place {
        round: order.round.round,
        seq: order.seq,
    };
    let ranked = (board.before + 1..).zip(board.orders).collect();
    Ok(axum::Json(page.page(ranked, place, |(rank, order)| {
        entry(rank, &order, &shop, &sale, &names)
    })))
}

fn buyers(board: &LeaderboardPage) -> Vec<BuyerId> {
    board.orders.iter().map(|order| order.buyer).collect()
}

fn entry(
    rank: u64,
    order: &Order,
    shop: &Shop,
    sale: &SaleFacts,
    names: &HashMap<BuyerId, Arc<str>>,
) -> Entry {
    Entry {
        rank,
        buyer: shop.pseudonyms.of(sale.id, order.buyer),
        name: names.get(&order.buyer).map(ToString::to_string),
        quantity: order.quantity,
        accepted_at: Timestamp::from_ms(order.accepted_at_ms),
        seq: order.seq,
    }
}

/// A confirmed order near the caller's.
#[derive(Serialize, ToSchema)]
struct Neighbour {
    #[serde(flatten)]
    entry: Entry,
    /// Whether it is the caller's own.
    you: bool,
}

/// The leaderboard around the caller.
#[derive(Serialize, ToSchema)]
struct Around {
    /// The place of the caller's first confirmed order; null without one.
    rank: Option<u64>,
    /// What the caller is called in this sale.
    #[schema(example = "kx0Zq3mJ7vYtR2aB")]
    buyer: String,
    /// In order of purchase.
    data: Vec<Neighbour>,
}

/// How much to show around the caller.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct AroundQuery {
    /// Of which running of the sale; the present one if absent.
    #[param(minimum = 1)]
    round: Option<u32>,
    /// Entries, half of them before the caller's; 21 if absent.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<i64>,
}

/// Show the leaderboard around me
///
/// Around the caller's first confirmed order. An order shows here a moment after its 201, when it
/// is stored.
#[utoipa::path(get, path = "/v1/sales/{id}/leaderboard/me", tag = "leaderboard",
    params(("id" = Uuid, Path), AroundQuery),
    responses((status = 200, description = "The caller and who is near", body = Around)))]
async fn me(
    Caller(caller): Caller,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    Query(query): Query<AroundQuery>,
) -> Result<axum::Json<Around>, Problem> {
    let limit = query.limit.unwrap_or(AROUND_DEFAULT);
    if !AROUND.contains(&limit) {
        return Err(Problem::unreadable("#/query/limit", "must be 1 to 100"));
    }
    let limit = usize::try_from(limit).map_err(Problem::internal)?;
    let me = BuyerId(caller.user);
    let (board, sale) = shop
        .leaderboard_around(SaleId(id), query.round, me, limit)
        .await?;
    let mut data = Vec::new();
    if let Some(board) = board {
        let names = shop.names.of(&buyers(&board)).await;
        let ranked = (board.before + 1..).zip(&board.orders);
        data.extend(ranked.map(|(rank, order)| Neighbour {
            entry: entry(rank, order, &shop, &sale, &names),
            you: order.buyer == me,
        }));
    }
    // Redis may have cancelled it since PostgreSQL was asked.
    let mine = data.iter().find(|neighbour| neighbour.you);
    Ok(axum::Json(Around {
        rank: mine.map(|neighbour| neighbour.entry.rank),
        buyer: shop.pseudonyms.of(sale.id, me),
        data,
    }))
}
