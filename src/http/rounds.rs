//! The rounds of a sale: past, present, missed, and to come.

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Path, Query},
    check::{Price, Timestamp},
    page::{Page, Pagination},
    problem::{Code, Problem},
    routes::{Access, Routes},
};
use crate::{
    domain::{id::SaleId, money::Money, round},
    sales::{self, Shop},
};

pub(super) fn routes() -> Routes {
    Routes::new().add(
        Access::Anyone,
        routes!(rounds),
        &[Code::NotFound, Code::Validation],
    )
}

/// What a round is.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum RoundState {
    /// In the schedule, and not made yet: it may still change.
    Planned,
    /// Made, before its window.
    Scheduled,
    /// Selling.
    Open,
    /// Inside its window, stopped for now.
    Paused,
    /// Past its window, or closed early.
    Closed,
    /// Its window passed while nothing was running. It is not run late.
    Missed,
}

/// One running of a sale.
#[derive(Serialize, ToSchema)]
struct RoundView {
    /// 1, 2, 3 …, once it is made. A window that was missed before that has none.
    round: Option<u32>,
    #[schema(inline)]
    state: RoundState,
    opens_at: Timestamp,
    closes_at: Option<Timestamp>,
    /// Of one unit. What is planned shows what it would be made from now.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Price, required = false)]
    price: Option<Money>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = i64, required = false)]
    per_buyer_limit: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = i64, required = false)]
    per_order_limit: Option<u64>,
    /// Units given to the round so far: always `remaining` + `held` + `sold`, which are absent
    /// until it is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = i64, required = false)]
    allocation: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = i64, required = false)]
    remaining: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = i64, required = false)]
    held: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = i64, required = false)]
    sold: Option<u64>,
    /// The number of its last event.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = i64, required = false)]
    seq: Option<u64>,
}

impl From<sales::RoundView> for RoundView {
    fn from(view: sales::RoundView) -> Self {
        let state = match view.state {
            sales::RoundState::Planned => RoundState::Planned,
            sales::RoundState::Missed => RoundState::Missed,
            sales::RoundState::Made(round::State::Scheduled) => RoundState::Scheduled,
            sales::RoundState::Made(round::State::Open) => RoundState::Open,
            sales::RoundState::Made(round::State::Paused) => RoundState::Paused,
            sales::RoundState::Made(round::State::Closed) => RoundState::Closed,
        };
        let (rules, counters) = (view.rules, view.counters);
        Self {
            round: view.round,
            state,
            opens_at: Timestamp::from_ms(view.window.opens_at_ms),
            closes_at: view.window.closes_at_ms.map(Timestamp::from_ms),
            price: rules.map(|rules| rules.unit_price),
            per_buyer_limit: rules.map(|rules| rules.per_buyer_limit),
            per_order_limit: rules.map(|rules| rules.per_order_limit),
            allocation: counters
                .map(|counters| counters.allocation)
                .or(rules.map(|rules| rules.allocation)),
            remaining: counters.map(|counters| counters.remaining),
            held: counters.map(|counters| counters.held),
            sold: counters.map(|counters| counters.sold),
            seq: counters.map(|counters| counters.seq),
        }
    }
}

/// Which rounds to list.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct RoundQuery {
    /// Rounds on a page, 20 if absent.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<i64>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

/// List the rounds of a sale
///
/// In the order in which they open: those that were, those that were missed, the present one, and
/// those to come; of a schedule without an end the next hundred.
#[utoipa::path(get, path = "/v1/sales/{id}/rounds", tag = "sales",
    params(("id" = Uuid, Path), RoundQuery),
    responses((status = 200, description = "A page", body = Page<RoundView>)))]
async fn rounds(
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    Query(query): Query<RoundQuery>,
) -> Result<axum::Json<Page<RoundView>>, Problem> {
    let page = Pagination::<i64>::read(query.limit, query.cursor.as_deref())?;
    let rows = usize::try_from(page.rows()).map_err(Problem::internal)?;
    let windows = shop
        .rounds(SaleId(id), page.after.unwrap_or(-1), rows)
        .await?;
    Ok(axum::Json(page.page(
        windows,
        |round| round.window.opens_at_ms,
        RoundView::from,
    )))
}
