//! The rounds of a sale: past, present, missed, and to come.

use std::sync::Arc;

use axum::{
    extract::State,
    http::header::ETAG,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Json, Path, Query},
    caller::Operator,
    check::{Check, Price, Timestamp, present},
    page::{Page, Pagination},
    problem::{Code, Problem},
    routes::{Access, Routes},
    version::{IfMatch, live_etag, stale},
};
use crate::{
    domain::{
        id::SaleId,
        limits::{ALLOCATION_MAX, BUYER_LIMIT_MAX, HOLD_MS_MAX},
        money::Money,
        round,
    },
    sales::{self, Shop},
};

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(
            Access::Anyone,
            routes!(rounds),
            &[Code::NotFound, Code::Validation],
        )
        .add(Access::Anyone, routes!(round), &[Code::NotFound])
        .add(
            Access::Operator,
            routes!(change_round),
            &[
                Code::NotFound,
                Code::Conflict,
                Code::PreconditionFailed,
                Code::PreconditionRequired,
            ],
        )
        .add(
            Access::Operator,
            routes!(extend_round),
            &[Code::NotFound, Code::Conflict],
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

/// A round with the `ETag` of what a change would change.
fn shown(view: sales::RoundView) -> Response {
    let seq = view
        .counters
        .map_or(0, |counters| counters.seq.cast_signed());
    let etag = [(ETAG, live_etag(seq))];
    (etag, axum::Json(RoundView::from(view))).into_response()
}

/// Get a round
///
/// One that is made, never older than the request.
#[utoipa::path(get, path = "/v1/sales/{id}/rounds/{round}", tag = "sales",
    params(("id" = Uuid, Path), ("round" = u32, Path, minimum = 1, example = 1)),
    responses((status = 200, description = "The round", body = RoundView)))]
async fn round(
    State(shop): State<Arc<Shop>>,
    Path((id, round)): Path<(Uuid, u32)>,
) -> Result<Response, Problem> {
    Ok(shown(shop.made_round(SaleId(id), round).await?))
}

/// What to change of a round that has not opened; what is absent stays.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RoundChange {
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Timestamp, required = false)]
    opens_at: Option<Timestamp>,
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Timestamp, required = false)]
    closes_at: Option<Timestamp>,
    /// Of one unit.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Price, required = false)]
    price: Option<Price>,
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = i64, required = false, minimum = 1, maximum = 1_000_000)]
    per_buyer_limit: Option<i64>,
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = i64, required = false, minimum = 1, maximum = 1_000_000)]
    per_order_limit: Option<i64>,
    /// Seconds that an order may wait for its payment.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = i64, required = false, minimum = 1, maximum = 86_400)]
    hold_seconds: Option<i64>,
    /// Units of the round.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = i64, required = false, minimum = 1, maximum = 10_000_000)]
    allocation: Option<i64>,
}

impl RoundChange {
    fn check(&self) -> Result<sales::RoundChange, Problem> {
        let mut check = Check::new();
        let mut units = |pointer, units: Option<i64>, max| {
            units.map(|units| check.units(pointer, units, 1..=max))
        };
        let per_buyer_limit = units("#/per_buyer_limit", self.per_buyer_limit, BUYER_LIMIT_MAX);
        let per_order_limit = units("#/per_order_limit", self.per_order_limit, BUYER_LIMIT_MAX);
        let allocation = units("#/allocation", self.allocation, ALLOCATION_MAX);
        let hold = units("#/hold_seconds", self.hold_seconds, HOLD_MS_MAX / 1_000);
        let mut instant = |pointer, at: Option<Timestamp>| at.map(|at| check.instant(pointer, at));
        let opens_at_ms = instant("#/opens_at", self.opens_at);
        let closes_at_ms = instant("#/closes_at", self.closes_at);
        let price = self.price.as_ref();
        let unit_price = price.and_then(|price| check.price("#/price", price));
        check.done().map(|()| sales::RoundChange {
            opens_at_ms,
            closes_at_ms,
            unit_price,
            per_buyer_limit,
            per_order_limit,
            hold_ms: hold.map(|seconds| seconds * 1_000),
            allocation,
        })
    }
}

/// Change a round
///
/// One that is made and has not opened: its window, price, limits and units. It may not overlap the
/// rounds before and after it.
#[utoipa::path(patch, path = "/v1/sales/{id}/rounds/{round}", tag = "sales",
    request_body = RoundChange,
    params(("id" = Uuid, Path), ("round" = u32, Path, minimum = 1, example = 1),
        ("If-Match" = String, Header, description = "The ETag of the version to change")),
    responses((status = 200, description = "The round", body = RoundView)))]
async fn change_round(
    Operator(operator): Operator,
    State(shop): State<Arc<Shop>>,
    Path((id, round)): Path<(Uuid, u32)>,
    IfMatch(version): IfMatch,
    Json(change): Json<RoundChange>,
) -> Result<Response, Problem> {
    let change = change.check()?;
    let seq = u64::try_from(version).map_err(|_| stale())?;
    let changed = shop.change_round(SaleId(id), round, seq, change, operator.user);
    Ok(shown(changed.await.map_err(Problem::of_making)?))
}

/// A later end.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Extension {
    closes_at: Timestamp,
}

/// Put the end of the present round off
///
/// At most until the next one opens. Doing it twice is doing it once.
#[utoipa::path(post, path = "/v1/sales/{id}/extend", tag = "sales", request_body = Extension,
    params(("id" = Uuid, Path)),
    responses((status = 200, description = "The round", body = RoundView)))]
async fn extend_round(
    Operator(operator): Operator,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    Json(extension): Json<Extension>,
) -> Result<Response, Problem> {
    let mut check = Check::new();
    let closes_at_ms = check.instant("#/closes_at", extension.closes_at);
    check.done()?;
    let extended = shop.extend(SaleId(id), closes_at_ms, operator.user);
    Ok(shown(extended.await.map_err(Problem::of_making)?))
}
