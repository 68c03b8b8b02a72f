//! Sales: making them, watching them, and what operators do to them while they run.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{
        HeaderValue, StatusCode,
        header::{ETAG, LOCATION},
    },
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Json, Nothing, Path, Query},
    caller::Operator,
    check::{Check, Price, Timestamp, present},
    idempotency::{IDEMPOTENCY_REPLAYED, IdempotencyKey, REPLAYED},
    page::{Page, Pagination},
    problem::{Code, FieldError, Problem},
    routes::{Access, Routes},
    schedule::ScheduleBody,
    version::{IfMatch, live_etag},
};
use crate::{
    clock,
    domain::{
        hurdles::Hurdles,
        id::{Fingerprint, OperationId, ProductId, SaleId, SaleNumber},
        limits::{
            ACCOUNT_AGE_SECONDS_MAX, ALLOCATION_MAX, BUYER_LIMIT_MAX, HOLD_MS_MAX, PROOF_BITS_MAX,
        },
        money::Money,
        order::Mode,
        payment::Gateway,
        round::{self, Ends, Intent, LimitScope, Policy, Terms, TermsError, Window},
        schedule::Schedule,
    },
    payments::Gateways,
    sales::{SaleError, Shop},
    store::{
        products::Products,
        sales::{self, Filter, NewSale},
    },
};

const NAME_CHARACTERS: std::ops::RangeInclusive<usize> = 1..=200;
const SMALL_PRINT_CHARACTERS: std::ops::RangeInclusive<usize> = 1..=10_000;

pub(super) fn routes() -> Routes {
    const RUNS: &[Code] = &[Code::NotFound, Code::Conflict, Code::Validation];
    Routes::new()
        .add(Access::Anyone, routes!(list), &[Code::Validation])
        .add(Access::Anyone, routes!(get), &[Code::NotFound])
        .add(
            Access::Operator,
            routes!(create),
            &[Code::IdempotencyKeyMismatch],
        )
        .add(
            Access::Operator,
            routes!(change),
            &[
                Code::NotFound,
                Code::Conflict,
                Code::PreconditionFailed,
                Code::PreconditionRequired,
            ],
        )
        .add(Access::Operator, routes!(pause), RUNS)
        .add(Access::Operator, routes!(resume), RUNS)
        .add(Access::Operator, routes!(close), RUNS)
        .add(
            Access::Operator,
            routes!(restock),
            &[
                Code::NotFound,
                Code::Conflict,
                Code::IdempotencyKeyMissing,
                Code::IdempotencyKeyMismatch,
            ],
        )
        .add(
            Access::Operator,
            routes!(reduce),
            &[
                Code::NotFound,
                Code::Conflict,
                Code::Insufficient,
                Code::IdempotencyKeyMissing,
                Code::IdempotencyKeyMismatch,
            ],
        )
}

/// A sale to make.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SaleRequest {
    product_id: Uuid,
    /// The product's name if absent.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, min_length = 1, max_length = 200)]
    name: Option<String>,
    /// The small print.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, min_length = 1, max_length = 10_000)]
    terms: Option<String>,
    /// Of one unit; the product's price if absent.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Price, required = false)]
    price: Option<Price>,
    /// Units to sell.
    #[schema(example = 100, minimum = 1, maximum = 10_000_000)]
    allocation: i64,
    /// Units that one buyer may have.
    #[schema(example = 2, minimum = 1, maximum = 1_000_000)]
    per_buyer_limit: i64,
    /// Units that one order may ask for; `per_buyer_limit` if absent, and never more.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = i64, required = false, minimum = 1, maximum = 1_000_000)]
    per_order_limit: Option<i64>,
    /// Absent or in the past: the sale is open at once. A standing sale has neither this nor
    /// `closes_at`; nor has one with a `schedule`.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Timestamp, required = false)]
    opens_at: Option<Timestamp>,
    /// If absent, the sale runs until it is sold out or closed.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Timestamp, required = false)]
    closes_at: Option<Timestamp>,
    /// Seconds that an order may wait for its payment: orders start as `held`, and what is not paid
    /// in time is for sale again. If absent, orders are confirmed at once.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = i64, required = false, minimum = 1, maximum = 86_400)]
    hold_seconds: Option<i64>,
    /// What `per_buyer_limit` counts over: each `round` by itself, or all rounds of the `sale`.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, pattern = "^(round|sale)$")]
    limit_scope: Option<String>,
    /// What ends a round beside its window: `time`, nothing, so that units that come back are for
    /// sale again; `sold_out`, it closes once nothing remains and nothing is held.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, pattern = "^(time|sold_out)$")]
    ends: Option<String>,
    /// Whether buyers may wait in line for units that come back; needs `hold_seconds`.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = bool, required = false)]
    waitlist: Option<bool>,
    /// Who takes the money: `none`, or a gateway that the server has (`sandbox`, `stripe`,
    /// `paypal`). Needs `hold_seconds`.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, pattern = "^(none|sandbox|stripe|paypal)$")]
    payment: Option<String>,
    /// Whether the units of a refunded order are for sale again; `true` if absent.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = bool, required = false)]
    refund_returns_units: Option<bool>,
    /// Opens the sale again and again, instead of `opens_at` and `closes_at`. Each opening is a
    /// round of its own, with the same units and limits.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = ScheduleBody, required = false)]
    schedule: Option<ScheduleBody>,
    /// What an acceptance survives, and so what a 201 waits for: `default`, as Redis is set up;
    /// `replicated`, as many replicas as the server is configured with; `committed`, PostgreSQL.
    /// While the stores cannot give it, the sale sells nothing.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, pattern = "^(default|replicated|committed)$")]
    durability: Option<String>,
    /// Seconds that a buyer's account must have existed; if absent, it may be new.
    #[serde(
        default,
        deserialize_with = "present",
        skip_serializing_if = "Option::is_none"
    )]
    #[schema(value_type = i64, required = false, minimum = 1, maximum = 31_536_000)]
    min_account_age_seconds: Option<i64>,
    /// Work that each order takes, in zero bits of a hash: each more doubles it, 16 is a second or two
    /// in a browser. If absent, there is none. See `POST /v1/sales/{id}/challenge`.
    #[serde(
        default,
        deserialize_with = "present",
        skip_serializing_if = "Option::is_none"
    )]
    #[schema(value_type = i64, required = false, minimum = 1, maximum = 24)]
    proof_of_work_bits: Option<i64>,
}

/// Units to add, or to take out.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Restock {
    #[schema(example = 10, minimum = 1, maximum = 10_000_000)]
    units: i64,
}

/// A sale as it stands.
#[derive(Serialize, ToSchema)]
struct SaleView {
    id: Uuid,
    product_id: Uuid,
    name: String,
    /// The small print.
    terms: Option<String>,
    /// Of one unit.
    #[schema(value_type = Price)]
    price: Money,
    state: round::State,
    /// Whether nothing is left.
    sold_out: bool,
    /// Which running of the sale this is.
    round: u32,
    /// Units given to the round so far: always `remaining` + `held` + `sold`.
    allocation: u64,
    remaining: u64,
    /// Units of orders that wait for their payment.
    held: u64,
    sold: u64,
    /// The number of the round's last event.
    seq: u64,
    per_buyer_limit: u64,
    per_order_limit: u64,
    /// Between two rounds, when the next one opens.
    opens_at: Timestamp,
    closes_at: Option<Timestamp>,
    /// When its rounds open, if there is more than one.
    schedule: Option<ScheduleBody>,
    /// Seconds that an order may wait for its payment; `null` when orders are confirmed at once.
    hold_seconds: Option<u64>,
    #[schema(inline)]
    limit_scope: LimitScope,
    #[schema(inline)]
    ends: Ends,
    /// Whether buyers may wait in line for units that come back.
    waitlist: bool,
    /// Buyers in that line; what comes back is theirs first.
    waiting: u64,
    /// The clock that decides, in milliseconds since the Unix epoch.
    server_time_ms: i64,
    /// Who takes the money; `none` confirms orders without any.
    #[schema(example = "none")]
    payment: &'static str,
    /// Whether the units of a refunded order are for sale again.
    refund_returns_units: bool,
    /// Seconds that a buyer's account must have existed; `null` when it may be new.
    min_account_age_seconds: Option<u32>,
    /// Zero bits of the proof of work that each order needs; `null` when it needs none.
    proof_of_work_bits: Option<u8>,
    /// What its acceptances survive; each order says what its own does.
    durability: Mode,
    /// Why nothing of it is sold at the moment, although it may be open: the stores cannot keep
    /// what it promises.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "STOCKADE_REPLICAS is 0, must be the number of replicas to wait for")]
    lack: Option<String>,
    created_at: Timestamp,
    updated_at: Timestamp,
}

impl From<crate::sales::SaleView> for SaleView {
    fn from(view: crate::sales::SaleView) -> Self {
        let crate::sales::SaleView {
            facts,
            standing,
            lack,
        } = view;
        Self {
            id: facts.id.0,
            product_id: facts.product.0,
            name: facts.name.clone(),
            terms: facts.small_print.clone(),
            price: facts.terms.unit_price,
            state: standing.state,
            sold_out: standing.sold_out(),
            round: standing.round.round,
            allocation: standing.counters.allocation,
            remaining: standing.counters.remaining,
            held: standing.counters.held,
            sold: standing.counters.sold,
            seq: standing.counters.seq,
            per_buyer_limit: facts.terms.per_buyer_limit,
            per_order_limit: facts.terms.per_order_limit,
            opens_at: Timestamp::from_ms(standing.window.opens_at_ms),
            closes_at: standing.window.closes_at_ms.map(Timestamp::from_ms),
            schedule: facts.schedule.as_deref().map(ScheduleBody::from),
            hold_seconds: facts.terms.policy.hold_ms.map(|ms| ms / 1_000),
            limit_scope: facts.terms.policy.limit_scope,
            ends: facts.terms.policy.ends,
            waitlist: facts.terms.policy.waitlist,
            waiting: standing.waiting,
            server_time_ms: standing.now_ms,
            payment: facts.payment.map_or("none", Gateway::as_str),
            refund_returns_units: facts.refund_returns_units,
            min_account_age_seconds: facts.hurdles.min_account_age_seconds,
            proof_of_work_bits: facts.hurdles.proof_of_work_bits,
            durability: facts.durability,
            lack: lack.map(|lack| lack.to_string()),
            created_at: Timestamp(facts.created_at),
            updated_at: Timestamp(facts.updated_at),
        }
    }
}

/// Which sales to list.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct SaleQuery {
    /// Only sales in this state.
    #[param(inline)]
    state: Option<round::State>,
    /// Sales on a page, 20 if absent.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<i64>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

/// List sales
///
/// Newest first, each as it stands at the moment.
#[utoipa::path(get, path = "/v1/sales", tag = "sales", params(SaleQuery),
    responses((status = 200, description = "A page", body = Page<SaleView>)))]
async fn list(
    State(shop): State<Arc<Shop>>,
    Query(query): Query<SaleQuery>,
) -> Result<axum::Json<Page<SaleView>>, Problem> {
    let page = Pagination::<SaleNumber>::read(query.limit, query.cursor.as_deref())?;
    let filter = Filter {
        state: query.state,
        now: clock::now(),
        product: None,
        after: page.after,
        limit: page.rows(),
    };
    let rows = shop.list(filter).await?;
    let mut page = page.page(rows, |row| row.facts.number, SaleView::from);
    // PostgreSQL chose them, and it may be behind what Redis has said since.
    page.retain(|sale| query.state.is_none_or(|state| sale.state == state));
    Ok(axum::Json(page))
}

/// Get a sale
///
/// Never older than the request.
#[utoipa::path(get, path = "/v1/sales/{id}", tag = "sales", params(("id" = Uuid, Path)),
    responses((status = 200, description = "The sale", body = SaleView)))]
async fn get(State(shop): State<Arc<Shop>>, Path(id): Path<Uuid>) -> Result<Response, Problem> {
    Ok(shown(shop.view(SaleId(id)).await?))
}

/// A sale with the `ETag` of what a change would change. Its stock moves by itself.
fn shown(view: crate::sales::SaleView) -> Response {
    let etag = [(ETAG, live_etag(view.facts.version))];
    (etag, axum::Json(SaleView::from(view))).into_response()
}

/// What to change; what is absent stays.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SaleChange {
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, min_length = 1, max_length = 200)]
    name: Option<String>,
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, min_length = 1, max_length = 10_000)]
    terms: Option<String>,
    /// Seconds that a buyer's account must have existed, from now on and in every round; `null` lets
    /// new ones buy, too.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<i64>, required = false, minimum = 1, maximum = 31_536_000)]
    min_account_age_seconds: Option<Nullable<i64>>,
    /// Zero bits of the proof of work that each order needs, from now on and in every round; `null`
    /// asks for none.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<i64>, required = false, minimum = 1, maximum = 24)]
    proof_of_work_bits: Option<Nullable<i64>>,
    /// Of one unit of the next rounds.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Price, required = false)]
    price: Option<Price>,
    /// Units of each of the next rounds.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = i64, required = false, minimum = 1, maximum = 10_000_000)]
    allocation: Option<i64>,
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = i64, required = false, minimum = 1, maximum = 1_000_000)]
    per_buyer_limit: Option<i64>,
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = i64, required = false, minimum = 1, maximum = 1_000_000)]
    per_order_limit: Option<i64>,
    /// Seconds that orders of the next rounds may wait for their payment.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = i64, required = false, minimum = 1, maximum = 86_400)]
    hold_seconds: Option<i64>,
    /// What ends the next rounds beside their window: `time` or `sold_out`.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = String, required = false, pattern = "^(time|sold_out)$")]
    ends: Option<String>,
    /// Whether buyers may wait in line in the next rounds.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = bool, required = false)]
    waitlist: Option<bool>,
    /// When rounds open behind those that are made; `null` makes no more of them.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<ScheduleBody>, required = false)]
    schedule: Option<Nullable<ScheduleBody>>,
}

/// A value, or `null` for none.
#[derive(Deserialize)]
#[serde(transparent)]
struct Nullable<T>(Option<T>);

impl SaleChange {
    fn check(&self, by: Uuid) -> Result<sales::SaleChange, Problem> {
        let mut check = Check::new();
        let mut units = |pointer, units: Option<i64>, max| {
            units.map(|units| check.units(pointer, units, 1..=max))
        };
        let allocation = units("#/allocation", self.allocation, ALLOCATION_MAX);
        let per_buyer_limit = units("#/per_buyer_limit", self.per_buyer_limit, BUYER_LIMIT_MAX);
        let per_order_limit = units("#/per_order_limit", self.per_order_limit, BUYER_LIMIT_MAX);
        let hold_ms = units("#/hold_seconds", self.hold_seconds, HOLD_MS_MAX / 1_000);
        let hold_ms = hold_ms.map(|seconds| seconds * 1_000);
        let min_account_age_seconds = self
            .min_account_age_seconds
            .as_ref()
            .map(|age| age.0.and_then(|age| account_age(&mut check, age)));
        let proof_of_work_bits = self
            .proof_of_work_bits
            .as_ref()
            .map(|bits| bits.0.and_then(|bits| proof_bits(&mut check, bits)));
        let ends = self.ends.as_deref().map(Ends::parse);
        if ends == Some(None) {
            check.refuse("#/ends", "must be time or sold_out");
        }
        let mut text = |pointer, text: &Option<String>, characters| {
            let text = text.as_ref();
            text.map(|text| check.text(pointer, text, characters))
        };
        let name = text("#/name", &self.name, NAME_CHARACTERS);
        let small_print = text("#/terms", &self.terms, SMALL_PRINT_CHARACTERS);
        let price = self.price.as_ref();
        let unit_price = price.and_then(|price| check.price("#/price", price));
        let schedule = self.schedule.as_ref().map(|schedule| {
            let schedule = schedule.0.as_ref();
            schedule.and_then(|schedule| schedule.check(&mut check, clock::now_ms()))
        });
        check.done().map(|()| sales::SaleChange {
            name,
            small_print,
            min_account_age_seconds,
            proof_of_work_bits,
            unit_price,
            allocation,
            per_buyer_limit,
            per_order_limit,
            hold_ms,
            ends: ends.flatten(),
            waitlist: self.waitlist,
            schedule,
            by,
        })
    }
}

/// Change a sale
///
/// Its name, its small print and what it asks of buyers, at once; price, units, limits, holds, end, waitlist and schedule of the rounds
/// that are not made yet. Rounds that are made keep what they have.
#[utoipa::path(patch, path = "/v1/sales/{id}", tag = "sales", request_body = SaleChange,
    params(("id" = Uuid, Path), ("If-Match" = String, Header, description = "The ETag of the version to change")),
    responses((status = 200, description = "The sale", body = SaleView)))]
async fn change(
    Operator(operator): Operator,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    IfMatch(version): IfMatch,
    Json(change): Json<SaleChange>,
) -> Result<Response, Problem> {
    let change = change.check(operator.user)?;
    let changed = shop.change(SaleId(id), version, change).await;
    Ok(shown(changed.map_err(Problem::of_making)?))
}

/// Make a sale
///
/// It can sell as soon as this is answered. With an `Idempotency-Key` a retry makes no other sale,
/// and gets the one that is there.
#[utoipa::path(post, path = "/v1/sales", tag = "sales", request_body = SaleRequest,
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible ASCII characters")),
    responses((status = 201, description = "The sale", body = SaleView)))]
async fn create(
    Operator(operator): Operator,
    State(shop): State<Arc<Shop>>,
    State(products): State<Products>,
    State(gateways): State<Gateways>,
    key: Option<IdempotencyKey>,
    Json(request): Json<SaleRequest>,
) -> Result<Response, Problem> {
    let offer = request.check(clock::now_ms())?;
    if let Some(gateway) = offer.payment
        && gateways.of(gateway).is_none()
    {
        let error = FieldError::new("#/payment", not_configured(gateway));
        return Err(Problem::out_of_range(vec![error]));
    }
    // Strings, numbers and instants always become JSON.
    let canonical = serde_json::to_vec(&request).map_err(Problem::internal)?;
    let product = products
        .by_id(offer.product)
        .await
        .map_err(|error| Problem::from(error).of_reading())?
        .ok_or(SaleError::NoProduct)?;
    let id = SaleId(match &key {
        Some(key) => OperationId::derive("sales.create", operator.user, &key.0).0,
        None => clock::new_id(),
    });
    let window = match &offer.schedule {
        None => offer.window,
        Some(schedule) => match schedule.first(shop.now_ms(shop.home(id))) {
            Some(first) if schedule.begins_with(first) => first,
            // A retry may come late; a sale that is there is not made again.
            _ if shop
                .sales
                .by_id(id)
                .await
                .map_err(SaleError::from)?
                .is_some() =>
            {
                offer.window
            }
            _ => return Err(passed(schedule)),
        },
    };
    let terms = offer.terms(window, product.content.price)?;
    let sale = NewSale {
        id,
        fingerprint: Fingerprint::of(&[b"sale", &canonical]),
        partition: shop.home(id),
        product: offer.product,
        name: offer.name.unwrap_or(product.content.name),
        small_print: offer.small_print,
        durability: offer.durability,
        payment: offer.payment,
        refund_returns_units: offer.refund_returns_units,
        hurdles: offer.hurdles,
        terms,
        schedule: offer.schedule,
        created_by: operator.user,
    };
    let (view, replayed) = shop.create(sale).await.map_err(Problem::of_making)?;
    // Hexadecimal digits and hyphens are always a header's value.
    let location = HeaderValue::try_from(format!("/v1/sales/{id}")).map_err(Problem::internal)?;
    let headers = [(LOCATION, location)];
    let replayed = replayed.then_some([(IDEMPOTENCY_REPLAYED, REPLAYED)]);
    let body = axum::Json(SaleView::from(view));
    Ok((StatusCode::CREATED, headers, replayed, body).into_response())
}

/// The refusal of a schedule that begins in the past.
fn passed(schedule: &Schedule) -> Problem {
    let (pointer, detail) = match schedule {
        Schedule::Windows(_) => ("#/schedule/windows/0/closes_at", "has passed"),
        Schedule::Recurring(_) => ("#/schedule/until", "has passed: no opening is left"),
    };
    Problem::out_of_range(vec![FieldError::new(pointer, detail)])
}

/// Pause a sale
///
/// Nobody can buy until it is resumed. Doing it twice is doing it once.
#[utoipa::path(post, path = "/v1/sales/{id}/pause", tag = "sales", params(("id" = Uuid, Path)),
    responses((status = 200, description = "The sale", body = SaleView)))]
async fn pause(
    Operator(operator): Operator,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    _: Option<Json<Nothing>>,
) -> Result<axum::Json<SaleView>, Problem> {
    let view = shop.control(SaleId(id), Intent::Paused, operator.user);
    Ok(axum::Json(view.await?.into()))
}

/// Resume a sale
///
/// Takes a pause back. Doing it twice is doing it once.
#[utoipa::path(post, path = "/v1/sales/{id}/resume", tag = "sales", params(("id" = Uuid, Path)),
    responses((status = 200, description = "The sale", body = SaleView)))]
async fn resume(
    Operator(operator): Operator,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    _: Option<Json<Nothing>>,
) -> Result<axum::Json<SaleView>, Problem> {
    let view = shop.control(SaleId(id), Intent::Live, operator.user);
    Ok(axum::Json(view.await?.into()))
}

/// Close a sale
///
/// For ever; of a sale with a schedule only the present round, or between rounds the next one.
/// Doing it twice is doing it once.
#[utoipa::path(post, path = "/v1/sales/{id}/close", tag = "sales", params(("id" = Uuid, Path)),
    responses((status = 200, description = "The sale", body = SaleView)))]
async fn close(
    Operator(operator): Operator,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    _: Option<Json<Nothing>>,
) -> Result<axum::Json<SaleView>, Problem> {
    let view = shop.control(SaleId(id), Intent::Closed, operator.user);
    Ok(axum::Json(view.await?.into()))
}

/// Add units to a sale
///
/// Once for each `Idempotency-Key`, however often it is sent.
#[utoipa::path(post, path = "/v1/sales/{id}/restock", tag = "sales", request_body = Restock,
    params(("id" = Uuid, Path), ("Idempotency-Key" = String, Header, description = "1 to 255 visible ASCII characters")),
    responses((status = 200, description = "The sale", body = SaleView)))]
async fn restock(
    Operator(operator): Operator,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    key: IdempotencyKey,
    Json(restock): Json<Restock>,
) -> Result<Response, Problem> {
    allocate(&shop, id, false, &restock, operator.user, &key).await
}

/// Take units out of a sale
///
/// Only what remains, all of it or nothing: held and sold units stay. Once for each
/// `Idempotency-Key`, however often it is sent.
#[utoipa::path(post, path = "/v1/sales/{id}/reduce", tag = "sales", request_body = Restock,
    params(("id" = Uuid, Path), ("Idempotency-Key" = String, Header, description = "1 to 255 visible ASCII characters")),
    responses((status = 200, description = "The sale", body = SaleView)))]
async fn reduce(
    Operator(operator): Operator,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    key: IdempotencyKey,
    Json(reduce): Json<Restock>,
) -> Result<Response, Problem> {
    allocate(&shop, id, true, &reduce, operator.user, &key).await
}

async fn allocate(
    shop: &Shop,
    id: Uuid,
    reduce: bool,
    wanted: &Restock,
    actor: Uuid,
    key: &IdempotencyKey,
) -> Result<Response, Problem> {
    let mut check = Check::new();
    let units = check.units("#/units", wanted.units, 1..=ALLOCATION_MAX);
    check.done()?;
    let (view, replayed) = shop
        .allocate(SaleId(id), reduce, units, actor, &key.0)
        .await?;
    let replayed = replayed.then_some([(IDEMPOTENCY_REPLAYED, REPLAYED)]);
    Ok((replayed, axum::Json(SaleView::from(view))).into_response())
}

/// A request for a sale whose values are in range by themselves.
struct Offer {
    product: ProductId,
    name: Option<String>,
    small_print: Option<String>,
    price: Option<Money>,
    allocation: u64,
    per_buyer_limit: u64,
    per_order_limit: u64,
    /// Of the first round, if there is no schedule to say.
    window: Window,
    schedule: Option<Schedule>,
    policy: Policy,
    durability: Mode,
    payment: Option<Gateway>,
    refund_returns_units: bool,
    hurdles: Hurdles,
}

/// How old an account shall be, in seconds.
fn account_age(check: &mut Check, seconds: i64) -> Option<u32> {
    let range = 1..=ACCOUNT_AGE_SECONDS_MAX;
    let seconds = check.units("#/min_account_age_seconds", seconds, range);
    u32::try_from(seconds).ok()
}

/// How much work an order shall take, in bits.
fn proof_bits(check: &mut Check, bits: i64) -> Option<u8> {
    let bits = check.units("#/proof_of_work_bits", bits, 1..=PROOF_BITS_MAX.into());
    u8::try_from(bits).ok()
}

/// What an operator has to do before a sale can have this gateway.
fn not_configured(gateway: Gateway) -> &'static str {
    match gateway {
        Gateway::Sandbox => "the sandbox is off: set STOCKADE_SANDBOX=on",
        Gateway::Stripe => {
            "Stripe is not configured: set STOCKADE_STRIPE_SECRET_KEY and STOCKADE_STRIPE_WEBHOOK_SECRET"
        }
        Gateway::Paypal => {
            "PayPal is not configured: set STOCKADE_PAYPAL_CLIENT_ID, STOCKADE_PAYPAL_CLIENT_SECRET and \
             STOCKADE_PAYPAL_WEBHOOK_ID"
        }
    }
}

impl SaleRequest {
    fn check(&self, now_ms: i64) -> Result<Offer, Problem> {
        let mut check = Check::new();
        let allocation = check.units("#/allocation", self.allocation, 1..=ALLOCATION_MAX);
        let per_buyer_limit = check.units(
            "#/per_buyer_limit",
            self.per_buyer_limit,
            1..=BUYER_LIMIT_MAX,
        );
        let per_order_limit = match self.per_order_limit {
            Some(limit) => check.units("#/per_order_limit", limit, 1..=per_buyer_limit),
            None => per_buyer_limit,
        };
        let name = self
            .name
            .as_ref()
            .map(|name| check.text("#/name", name, NAME_CHARACTERS));
        let small_print = self
            .terms
            .as_ref()
            .map(|terms| check.text("#/terms", terms, SMALL_PRINT_CHARACTERS));
        let price = self
            .price
            .as_ref()
            .and_then(|price| check.price("#/price", price));
        if self.schedule.is_some() {
            let given = [
                ("#/opens_at", self.opens_at.is_some()),
                ("#/closes_at", self.closes_at.is_some()),
            ];
            for (pointer, _) in given.into_iter().filter(|(_, given)| *given) {
                check.refuse(
                    pointer,
                    "must be absent: schedule says when each round opens and closes",
                );
            }
        }
        let schedule = self
            .schedule
            .as_ref()
            .and_then(|schedule| schedule.check(&mut check, now_ms));
        let window = Window {
            opens_at_ms: match self.opens_at {
                Some(opens_at) => check.instant("#/opens_at", opens_at),
                None => clock::now_ms(),
            },
            closes_at_ms: self
                .closes_at
                .map(|instant| check.instant("#/closes_at", instant)),
        };
        if window
            .closes_at_ms
            .is_some_and(|end| end <= window.opens_at_ms)
        {
            check.refuse("#/closes_at", TermsError::Window.to_string());
        }
        let hold_ms = self.hold_seconds.map(|seconds| {
            let seconds = check.units("#/hold_seconds", seconds, 1..=HOLD_MS_MAX / 1_000);
            seconds * 1_000
        });
        let limit_scope = self.limit_scope.as_deref().map(LimitScope::parse);
        if limit_scope == Some(None) {
            check.refuse("#/limit_scope", "must be round or sale");
        }
        let ends = self.ends.as_deref().map(Ends::parse);
        if ends == Some(None) {
            check.refuse("#/ends", "must be time or sold_out");
        }
        let payment = match self.payment.as_deref() {
            None | Some("none") => None,
            Some(word) => {
                let gateway = Gateway::parse(word);
                if gateway.is_none() {
                    check.refuse("#/payment", "must be none, sandbox, stripe or paypal");
                } else if self.hold_seconds.is_none() {
                    let detail =
                        "is needed when orders are paid: the seconds that a buyer has for it";
                    check.refuse("#/hold_seconds", detail);
                }
                gateway
            }
        };
        let durability = self.durability.as_deref().map(Mode::parse);
        if durability == Some(None) {
            check.refuse("#/durability", "must be default, replicated or committed");
        }
        let hurdles = Hurdles {
            min_account_age_seconds: self
                .min_account_age_seconds
                .and_then(|age| account_age(&mut check, age)),
            proof_of_work_bits: self
                .proof_of_work_bits
                .and_then(|bits| proof_bits(&mut check, bits)),
        };
        check.done().map(|()| Offer {
            product: ProductId(self.product_id),
            name,
            small_print,
            price,
            allocation,
            per_buyer_limit,
            per_order_limit,
            window,
            schedule,
            policy: Policy {
                hold_ms,
                limit_scope: limit_scope.flatten().unwrap_or_default(),
                ends: ends.flatten().unwrap_or_default(),
                waitlist: self.waitlist.unwrap_or_default(),
            },
            durability: durability.flatten().unwrap_or_default(),
            payment,
            refund_returns_units: self.refund_returns_units.unwrap_or(true),
            hurdles,
        })
    }
}

impl Offer {
    /// The rules of the first round; the values are in range together too.
    fn terms(&self, window: Window, product_price: Money) -> Result<Terms, Problem> {
        let terms = Terms {
            window,
            per_buyer_limit: self.per_buyer_limit,
            per_order_limit: self.per_order_limit,
            unit_price: self.price.unwrap_or(product_price),
            allocation: self.allocation,
            policy: self.policy,
        };
        terms.check().map(|()| terms).map_err(contradiction)
    }
}

/// The refusal of rules that contradict each other.
pub(super) fn contradiction(error: TermsError) -> Problem {
    let pointer = match error {
        TermsError::Allocation => "#/allocation",
        TermsError::BuyerLimit => "#/per_buyer_limit",
        TermsError::OrderLimit => "#/per_order_limit",
        TermsError::Window => "#/closes_at",
        TermsError::Total => "#/price",
        TermsError::Hold => "#/hold_seconds",
        TermsError::Waitlist => "#/waitlist",
    };
    Problem::out_of_range(vec![FieldError::new(pointer, error.to_string())])
}

#[cfg(test)]
mod tests {
    use axum::{
        Router,
        body::Body,
        http::{Request, header::CONTENT_TYPE},
        routing::post,
    };
    use serde_json::{Value, json};

    use super::{
        super::tests::{Answer, edged},
        *,
    };
    use crate::domain::money::Currency;

    fn sound() -> Value {
        json!({
            "product_id": "0192f0c1-2345-7890-abcd-ef0123456789",
            "allocation": 100,
            "per_buyer_limit": 2,
            "opens_at": "2026-11-27T09:00:00Z",
        })
    }

    /// A sound body with some members changed.
    fn with(changes: &Value) -> Value {
        let mut body = sound();
        let members = changes.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(members);
        body
    }

    /// Answers `opens_at closes_at per_order_limit amount`, with a product of 1999 cents.
    async fn send(body: &Value) -> Answer {
        let handler = async |Json(request): Json<SaleRequest>| {
            let currency = Currency::parse("EUR").map_err(Problem::internal)?;
            let price = Money::new(1999, currency).map_err(Problem::internal)?;
            let offer = request.check(1_795_000_000_000)?;
            let terms = offer.terms(offer.window, price)?;
            let Window {
                opens_at_ms,
                closes_at_ms,
            } = terms.window;
            let (limit, amount) = (terms.per_order_limit, terms.unit_price.amount);
            Ok::<_, Problem>(format!(
                "{opens_at_ms} {} {limit} {amount}",
                closes_at_ms.unwrap_or(0)
            ))
        };
        let router = edged(Router::new().route("/", post(handler)));
        let request = Request::post("/").header(CONTENT_TYPE, "application/json");
        Answer::of(router, request.body(Body::from(body.to_string())).unwrap()).await
    }

    #[tokio::test]
    async fn what_is_absent_has_a_default_and_instants_are_read_to_the_millisecond() {
        for (changes, understood) in [
            (json!({}), "1795770000000 0 2 1999"),
            (
                json!({"opens_at": "2026-11-27T10:30:00.1239+01:30"}),
                "1795770000123 0 2 1999",
            ),
            (json!({"opens_at": "1970-01-01T00:00:00Z"}), "0 0 2 1999"),
            (
                json!({"closes_at": "2026-11-27T09:00:00.001Z", "per_order_limit": 1}),
                "1795770000000 1795770000001 1 1999",
            ),
            (
                json!({"price": {"amount": 0, "currency": "EUR"}, "payment": "none", "durability": "default",
                       "name": "Lamps", "terms": "No returns."}),
                "1795770000000 0 2 0",
            ),
        ] {
            let answer = send(&with(&changes)).await;
            assert_eq!(answer.text, understood, "{changes}");
        }
    }

    #[tokio::test]
    async fn every_bad_sale_is_refused_at_its_place() {
        for (changes, status, pointer) in [
            (json!({"allocation": 0}), 422, "#/allocation"),
            (json!({"allocation": 10_000_001}), 422, "#/allocation"),
            (json!({"allocation": 1.5}), 400, "#/allocation"),
            (json!({"allocation": null}), 400, "#/allocation"),
            (json!({"per_buyer_limit": 0}), 422, "#/per_buyer_limit"),
            (
                json!({"per_buyer_limit": 1_000_001}),
                422,
                "#/per_buyer_limit",
            ),
            (json!({"per_order_limit": 0}), 422, "#/per_order_limit"),
            (json!({"per_order_limit": 3}), 422, "#/per_order_limit"),
            (json!({"per_order_limit": null}), 400, "#/per_order_limit"),
            (json!({"opens_at": "tomorrow"}), 400, "#/opens_at"),
            (json!({"opens_at": 1_795_770_000}), 400, "#/opens_at"),
            (json!({"opens_at": "2026-11-27"}), 400, "#/opens_at"),
            (
                json!({"opens_at": "2026-11-27T09:00:00"}),
                400,
                "#/opens_at",
            ),
            (
                json!({"opens_at": "2026-02-30T09:00:00Z"}),
                400,
                "#/opens_at",
            ),
            (
                json!({"opens_at": "1970-01-01T00:00:00+00:01"}),
                422,
                "#/opens_at",
            ),
            (
                json!({"opens_at": "9999-12-31T23:59:59-00:01"}),
                422,
                "#/opens_at",
            ),
            (
                json!({"closes_at": "2026-11-27T09:00:00Z"}),
                422,
                "#/closes_at",
            ),
            (
                json!({"closes_at": "2026-11-27T09:00:00.0009Z"}),
                422,
                "#/closes_at",
            ),
            (json!({"closes_at": null}), 400, "#/closes_at"),
            (json!({"name": " "}), 422, "#/name"),
            (json!({"name": "n".repeat(201)}), 422, "#/name"),
            (json!({"name": null}), 400, "#/name"),
            (json!({"terms": ""}), 422, "#/terms"),
            (json!({"terms": "t".repeat(10_001)}), 422, "#/terms"),
            (
                json!({"price": {"amount": -1, "currency": "EUR"}}),
                422,
                "#/price/amount",
            ),
            (
                json!({"price": {"amount": 1, "currency": "eur"}}),
                422,
                "#/price/currency",
            ),
            (json!({"price": {"amount": 1}}), 400, "#/price/currency"),
            (
                json!({"price": {"amount": 100_000_000_000_000_i64, "currency": "EUR"}}),
                422,
                "#/price",
            ),
            (json!({"hold_seconds": 0}), 422, "#/hold_seconds"),
            (json!({"hold_seconds": 86_401}), 422, "#/hold_seconds"),
            (json!({"hold_seconds": null}), 400, "#/hold_seconds"),
            (json!({"limit_scope": "shop"}), 422, "#/limit_scope"),
            (json!({"ends": "never"}), 422, "#/ends"),
            (json!({"waitlist": true}), 422, "#/waitlist"),
            (json!({"waitlist": 1}), 400, "#/waitlist"),
            (json!({"schedule": {}}), 422, "#/opens_at"),
            (json!({"schedule": []}), 400, "#/schedule"),
            (
                json!({"schedule": {"every": "day"}}),
                400,
                "#/schedule/every",
            ),
            (json!({"payment": "cash"}), 422, "#/payment"),
            (json!({"payment": "stripe"}), 422, "#/hold_seconds"),
            (json!({"payment": 1}), 400, "#/payment"),
            (json!({"durability": "fsync"}), 422, "#/durability"),
            (json!({"durability": "Committed"}), 422, "#/durability"),
            (json!({"durability": null}), 400, "#/durability"),
            (
                json!({"min_account_age_seconds": 0}),
                422,
                "#/min_account_age_seconds",
            ),
            (
                json!({"min_account_age_seconds": 31_536_001}),
                422,
                "#/min_account_age_seconds",
            ),
            (
                json!({"min_account_age_seconds": null}),
                400,
                "#/min_account_age_seconds",
            ),
            (
                json!({"proof_of_work_bits": 0}),
                422,
                "#/proof_of_work_bits",
            ),
            (
                json!({"proof_of_work_bits": 25}),
                422,
                "#/proof_of_work_bits",
            ),
            (
                json!({"proof_of_work_bits": 281}),
                422,
                "#/proof_of_work_bits",
            ),
            (
                json!({"proof_of_work_bits": 1.5}),
                400,
                "#/proof_of_work_bits",
            ),
            (json!({"product_id": "{p0}"}), 400, "#/product_id"),
            (json!({"stock": 1}), 400, "#/stock"),
        ] {
            let answer = send(&with(&changes)).await;
            assert_eq!(answer.status.as_u16(), status, "{changes}: {}", answer.text);
            assert_eq!(answer.body["code"], "validation");
            assert_eq!(answer.body["errors"][0]["pointer"], pointer, "{changes}");
        }
        let recurring = |changes: Value| {
            let mut schedule = json!({
                "cron": "0 18 * * FRI", "time_zone": "Europe/Berlin", "duration_seconds": 600,
            });
            let members = changes.as_object().unwrap().clone();
            schedule.as_object_mut().unwrap().extend(members);
            schedule
        };
        let listed = |windows: &[(&str, &str)]| {
            let day = |time: &str| format!("2027-01-01T{time}Z");
            let windows = windows
                .iter()
                .map(|(opens, closes)| json!({"opens_at": day(opens), "closes_at": day(closes)}));
            json!({ "windows": windows.collect::<Vec<_>>() })
        };
        for (schedule, status, pointer) in [
            (json!({}), 422, "#/schedule"),
            (json!({"cron": "0 18 * * *"}), 422, "#/schedule/time_zone"),
            (recurring(json!({"windows": []})), 422, "#/schedule"),
            (
                recurring(json!({"cron": "0 25 * * *"})),
                422,
                "#/schedule/cron",
            ),
            (
                recurring(json!({"cron": "0 0 30 2 *"})),
                422,
                "#/schedule/cron",
            ),
            (recurring(json!({"cron": 5})), 400, "#/schedule/cron"),
            (
                recurring(json!({"time_zone": "Berlin"})),
                422,
                "#/schedule/time_zone",
            ),
            (
                recurring(json!({"duration_seconds": 0})),
                422,
                "#/schedule/duration_seconds",
            ),
            (
                recurring(json!({"duration_seconds": -1})),
                422,
                "#/schedule/duration_seconds",
            ),
            (
                recurring(json!({"duration_seconds": 2_678_401})),
                422,
                "#/schedule/duration_seconds",
            ),
            (
                recurring(json!({"cron": "*/5 * * * *"})),
                422,
                "#/schedule/duration_seconds",
            ),
            (recurring(json!({"rounds": 0})), 422, "#/schedule/rounds"),
            (
                recurring(json!({"until": "Friday"})),
                400,
                "#/schedule/until",
            ),
            (
                recurring(json!({"starts_on": "2027-01-02", "until": "2027-01-01"})),
                422,
                "#/schedule/until",
            ),
            (listed(&[]), 422, "#/schedule/windows"),
            (
                listed(&[("10:00:00", "10:00:00")]),
                422,
                "#/schedule/windows/0/closes_at",
            ),
            (
                listed(&[("10:00:00", "11:00:00"), ("10:59:59", "12:00:00")]),
                422,
                "#/schedule/windows/1/opens_at",
            ),
            (
                json!({"windows": [{"opens_at": "2027-01-01T10:00:00Z"}]}),
                400,
                "#/schedule/windows/0/closes_at",
            ),
        ] {
            let mut body = with(&json!({"schedule": schedule}));
            body.as_object_mut().unwrap().remove("opens_at");
            let answer = send(&body).await;
            assert_eq!(
                answer.status.as_u16(),
                status,
                "{schedule}: {}",
                answer.text
            );
            assert_eq!(
                answer.body["errors"][0]["pointer"], pointer,
                "{schedule}: {}",
                answer.text
            );
        }
        for member in ["product_id", "allocation", "per_buyer_limit"] {
            let mut body = sound();
            body.as_object_mut().unwrap().remove(member);
            let answer = send(&body).await;
            assert_eq!(answer.status, StatusCode::BAD_REQUEST);
            assert_eq!(answer.body["errors"][0]["pointer"], format!("#/{member}"));
        }
    }

    #[tokio::test]
    async fn operations_without_a_body_take_none_or_an_empty_one() {
        let handler = async |_: Option<Json<Nothing>>| "done";
        let router = edged(Router::new().route("/", post(handler)));
        for (body, declared, status) in [
            ("", false, 200),
            ("", true, 200),
            ("{}", true, 200),
            ("{}", false, 415),
            ("{\"units\": 1}", true, 400),
            ("[", true, 400),
        ] {
            let mut request = Request::post("/");
            if declared {
                request = request.header(CONTENT_TYPE, "application/json");
            }
            let answer = Answer::of(router.clone(), request.body(Body::from(body)).unwrap()).await;
            assert_eq!(answer.status.as_u16(), status, "{body}");
        }
    }
}
