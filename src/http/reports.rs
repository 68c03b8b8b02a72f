//! What operators take home from a sale: its orders as a table, and what became of a round.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    sync::Arc,
};

use axum::{
    body::{Body, Bytes},
    extract::State,
    http::{
        HeaderValue,
        header::{CONTENT_DISPOSITION, CONTENT_TYPE},
    },
    response::{IntoResponse, Response},
};
use chrono::{DateTime, Utc};
use futures::stream;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Path, Query},
    caller::Operator,
    check::{Price, Timestamp},
    problem::{Code, Problem},
    routes::{Access, Routes},
};
use crate::{
    clock,
    domain::{
        id::{RoundId, SaleId},
        money::Money,
        order::Order,
    },
    sales::Shop,
    store::{
        StoreError,
        orders::{Orders, Place},
        reports::{Report, Reports},
        sales::SaleFacts,
    },
};

/// Orders that are read at a time: all that an export holds in memory.
const CHUNK: i64 = 1_000;

/// The columns of an export. New ones are added at the end.
const COLUMNS: &str = "order_id,sale_id,sale_name,round,seq,buyer_id,quantity,unit_price_minor,\
                       total_minor,currency,status,accepted_as,accepted_at,durability,\
                       returned_units,refunded_units\r\n";

pub(super) fn routes() -> Routes {
    const CODES: &[Code] = &[Code::NotFound, Code::Validation];
    Routes::new()
        .add(Access::Operator, routes!(orders), CODES)
        .add(Access::Operator, routes!(report), CODES)
}

/// Which round.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ExportQuery {
    /// Only orders of this running of the sale; all if absent.
    #[param(minimum = 1)]
    round: Option<u32>,
}

/// Export the orders of a sale
///
/// All stored orders as CSV (RFC 4180, UTF-8), in order of acceptance. Columns: `order_id`,
/// `sale_id`, `sale_name`, `round`, `seq`, `buyer_id`, `quantity`, `unit_price_minor`,
/// `total_minor`, `currency`, `status`, `accepted_as`, `accepted_at`, `durability`,
/// `returned_units` (back on sale), `refunded_units` (refunded, and not back on sale); new ones come
/// behind these. No cell begins with a sign that a spreadsheet would take for a formula. An answer
/// that breaks off is not complete.
#[utoipa::path(get, path = "/v1/sales/{id}/orders.csv", tag = "reports",
    params(("id" = Uuid, Path), ExportQuery),
    responses((status = 200, description = "The orders", body = String, content_type = "text/csv")))]
async fn orders(
    _: Operator,
    State(shop): State<Arc<Shop>>,
    Path(id): Path<Uuid>,
    Query(query): Query<ExportQuery>,
) -> Result<Response, Problem> {
    let (sale, _) = shop.round(SaleId(id), query.round).await?;
    let mut export = Export {
        orders: shop.orders.clone(),
        sale,
        round: query.round,
        after: Some((0, Place::default())),
    };
    // The first rows are there before the answer begins, so that a store that is away is a 503.
    let mut first = COLUMNS.as_bytes().to_vec();
    export.write(&mut first).await?;
    let rest = stream::unfold(export, async |mut export| {
        export.after?;
        let mut rows = Vec::new();
        match export.write(&mut rows).await {
            Ok(()) if rows.is_empty() => None,
            Ok(()) => Some((Ok(Bytes::from(rows)), export)),
            Err(error) => {
                tracing::warn!(%error, "an export breaks off");
                export.after = None;
                Some((Err(io::Error::other("the store does not answer")), export))
            }
        }
    });
    let first = stream::iter([Ok(Bytes::from(first))]);
    let file = HeaderValue::try_from(format!("attachment; filename=\"orders-{id}.csv\""));
    let headers = [
        (
            CONTENT_TYPE,
            HeaderValue::from_static("text/csv; charset=utf-8; header=present"),
        ),
        // Hexadecimal digits and hyphens are always a header's value.
        (CONTENT_DISPOSITION, file.map_err(Problem::internal)?),
    ];
    let body = Body::from_stream(futures::StreamExt::chain(first, rest));
    Ok((headers, body).into_response())
}

/// An export under way. It reads when its client takes what it has, and ends with it.
struct Export {
    orders: Orders,
    sale: Arc<SaleFacts>,
    round: Option<u32>,
    /// The last order written; `None` when there is no other.
    after: Option<(u32, Place)>,
}

impl Export {
    /// Writes the next orders.
    async fn write(&mut self, out: &mut Vec<u8>) -> Result<(), StoreError> {
        let Some(after) = self.after else {
            return Ok(());
        };
        let (sale, round) = (self.sale.number, self.round);
        let orders = self.orders.export(sale, round, after, CHUNK).await?;
        let full = i64::try_from(orders.len()).is_ok_and(|count| count == CHUNK);
        self.after = orders.last().filter(|_| full).map(|order| {
            let place = Place {
                epoch: order.epoch,
                seq: order.seq,
            };
            (order.round.round, place)
        });
        for order in &orders {
            row(out, order, &self.sale);
        }
        Ok(())
    }
}

fn row(out: &mut Vec<u8>, order: &Order, sale: &SaleFacts) {
    let cells = [
        order.id.to_string(),
        sale.id.to_string(),
        sale.name.clone(),
        order.round.round.to_string(),
        order.seq.to_string(),
        order.buyer.to_string(),
        order.quantity.to_string(),
        order.unit_price.amount.to_string(),
        order.total().amount.to_string(),
        order.unit_price.currency.as_str().to_owned(),
        order.status.as_str().to_owned(),
        order.accepted_as.as_str().to_owned(),
        Timestamp::from_ms(order.accepted_at_ms).to_string(),
        order.durability.as_str().to_owned(),
        order.returned.to_string(),
        order.refunded.to_string(),
    ];
    for (index, text) in cells.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        cell(out, text);
    }
    out.extend_from_slice(b"\r\n");
}

/// A cell: quoted where it must be, and never a formula.
fn cell(out: &mut Vec<u8>, text: &str) {
    let formula = text.starts_with(['=', '+', '-', '@', '\t', '\r']);
    let quoted = formula || text.contains([',', '"', '\r', '\n']);
    if quoted {
        out.push(b'"');
    }
    if formula {
        out.push(b'\'');
    }
    for part in text.bytes() {
        if part == b'"' {
            out.push(b'"');
        }
        out.push(part);
    }
    if quoted {
        out.push(b'"');
    }
}

/// Which round.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ReportQuery {
    /// Of which running of the sale; the present one if absent.
    #[param(minimum = 1)]
    round: Option<u32>,
}

/// What became of a round, as far as it is stored.
#[derive(Serialize, ToSchema)]
struct ReportView {
    sale_id: Uuid,
    #[schema(example = "Lamp drop")]
    sale_name: String,
    round: u32,
    /// When this was put together.
    generated_at: Timestamp,
    /// The first instant at which the round could sell.
    opened_at: Timestamp,
    closes_at: Option<Timestamp>,
    units: UnitsReport,
    #[schema(value_type = Price)]
    unit_price: Money,
    /// What the units that are sold cost together, at the price of the round.
    #[schema(value_type = Price)]
    revenue: Money,
    orders: OrdersReport,
    /// How long it took until nothing was left; null while that has not happened.
    sold_out: Option<SoldOutReport>,
    /// Purchases accepted over time.
    accepted_over_time: AcceptedSeries,
    demand: DemandReport,
    /// What became of orders that had to be paid; null where none had.
    holds: Option<HoldsReport>,
    /// What operators added or took away, and what came of it; the first two hundred.
    supply_changes: Vec<SupplyReport>,
    /// What to know before these figures are quoted.
    notes: Vec<&'static str>,
}

/// Where the units are.
#[derive(Serialize, ToSchema)]
struct UnitsReport {
    /// Units that the round began with.
    initial: u64,
    /// Units given to it since, taken ones subtracted: always `remaining` + `held` + `sold`.
    allocation: u64,
    remaining: u64,
    held: u64,
    sold: u64,
    /// Part of the allocation that is sold, 0 to 1.
    sell_through: f64,
}

/// What was accepted.
#[derive(Serialize, ToSchema)]
struct OrdersReport {
    /// Purchases accepted, whatever became of them.
    accepted: i64,
    /// Their units.
    units: i64,
    /// By status.
    #[schema(example = json!({"confirmed": 180, "cancelled": 3}))]
    by_status: BTreeMap<String, i64>,
    /// Different buyers.
    buyers: u64,
    first_at: Option<Timestamp>,
    last_at: Option<Timestamp>,
    /// Units of the largest order.
    largest_units: u64,
    /// The second with the most acceptances.
    busiest_second: Option<Point>,
}

/// The end of the stock.
#[derive(Serialize, ToSchema)]
struct SoldOutReport {
    /// When nothing was left for the first time.
    first_at: Timestamp,
    /// Milliseconds from the opening until then.
    after_ms: i64,
    /// How often nothing was left; units that came back can be sold out again.
    times: usize,
}

/// What was accepted in a while.
#[derive(Serialize, ToSchema)]
struct Point {
    /// Where the while begins.
    at: Timestamp,
    orders: i64,
    units: i64,
}

/// Acceptances over time.
#[derive(Serialize, ToSchema)]
struct AcceptedSeries {
    /// How long each while is.
    bucket_seconds: i64,
    /// At most some 120; those without an acceptance are left out.
    points: Vec<Point>,
}

/// Purchases and units.
#[derive(Clone, Copy, Default, Serialize, ToSchema)]
struct Asked {
    requests: i64,
    /// Units that they asked for.
    units: i64,
}

/// What was asked for.
#[derive(Serialize, ToSchema)]
struct DemandReport {
    /// Purchases decided: accepted and refused, retries of refused ones included.
    requests: i64,
    accepted: i64,
    refused: i64,
    /// Units that were refused because too few were left, retries included.
    unmet_units: i64,
    /// By the code of the problem.
    #[schema(example = json!({"sold_out": {"requests": 9000, "units": 12000}}))]
    refused_by_reason: BTreeMap<String, Asked>,
    refused_over_time: RefusedSeries,
}

/// Refusals over time.
#[derive(Serialize, ToSchema)]
struct RefusedSeries {
    /// How long each while is: a minute at least.
    bucket_seconds: i64,
    /// At most some 120; those without a refusal are left out.
    points: Vec<RefusedPoint>,
}

/// What was refused in a while.
#[derive(Serialize, ToSchema)]
struct RefusedPoint {
    /// Where the while begins.
    at: Timestamp,
    #[schema(example = json!({"sold_out": {"requests": 9000, "units": 12000}}))]
    by_reason: BTreeMap<String, Asked>,
}

/// Orders that began as holds.
#[derive(Serialize, ToSchema)]
struct HoldsReport {
    /// All of them.
    held: i64,
    /// Those that still wait for their payment.
    open: i64,
    /// Those that were paid, whatever became of them.
    paid: i64,
    /// Those that were paid, and have stayed so.
    confirmed: i64,
    expired: i64,
    cancelled: i64,
    refunded: i64,
    withdrawn: i64,
    /// Paid ones among those that do not wait any more; null without one.
    conversion: Option<f64>,
}

/// A restock or a reduction.
#[derive(Serialize, ToSchema)]
struct SupplyReport {
    at: Timestamp,
    #[schema(example = "restock")]
    kind: String,
    units: i64,
    /// Its place among the events of the round.
    seq: i64,
    /// Units accepted between this and the next one.
    sold_until_next: i64,
    /// Milliseconds until nothing was left again; null if that did not happen.
    sold_out_after_ms: Option<i64>,
}

/// Report on a round
///
/// Time to sell out, orders over time, demand and refusals by reason, what became of holds, what
/// restocks brought. Follows PostgreSQL: of a round that is selling, the last moment is missing.
#[utoipa::path(get, path = "/v1/sales/{id}/report", tag = "reports",
    params(("id" = Uuid, Path), ReportQuery),
    responses((status = 200, description = "The report", body = ReportView)))]
async fn report(
    _: Operator,
    State(shop): State<Arc<Shop>>,
    State(reports): State<Reports>,
    Path(id): Path<Uuid>,
    Query(query): Query<ReportQuery>,
) -> Result<axum::Json<ReportView>, Problem> {
    let (sale, round) = shop.round(SaleId(id), query.round).await?;
    // What this node has counted is in its own report.
    shop.demand.put_away().await;
    let report = reports.of(round).await?.ok_or_else(Problem::not_found)?;
    Ok(axum::Json(view(&sale, round, report)))
}

fn view(sale: &SaleFacts, round: RoundId, report: Report) -> ReportView {
    let counters = report.counters;
    let accepted: i64 = report.orders.iter().map(|row| row.orders).sum();
    let units: i64 = report.orders.iter().map(|row| row.units).sum();
    let mut by_status = BTreeMap::new();
    for row in &report.orders {
        *by_status.entry(row.status.clone()).or_default() += row.orders;
    }
    let mut by_reason: BTreeMap<String, Asked> = BTreeMap::new();
    let mut points: Vec<RefusedPoint> = Vec::new();
    for row in report.refused {
        let total = by_reason.entry(row.reason.clone()).or_default();
        total.requests += row.requests;
        total.units += row.units;
        let at = Timestamp(row.at);
        if points.last().is_none_or(|point| point.at != at) {
            points.push(RefusedPoint {
                at,
                by_reason: BTreeMap::new(),
            });
        }
        if let Some(point) = points.last_mut() {
            let asked = Asked {
                requests: row.requests,
                units: row.units,
            };
            point.by_reason.insert(row.reason, asked);
        }
    }
    let refused = by_reason.values().map(|asked| asked.requests).sum();
    let unmet = ["sold_out", "insufficient"].iter();
    let unmet_units = unmet
        .filter_map(|reason| by_reason.get(*reason))
        .map(|asked| asked.units)
        .sum();
    let sold_out = report.sold_out.first().map(|(at, _)| SoldOutReport {
        first_at: Timestamp(*at),
        after_ms: (*at - report.opened_at).num_milliseconds().max(0),
        times: report.sold_out.len(),
    });
    let again = |seq: i64, from: DateTime<Utc>| {
        let next = report.sold_out.iter().find(|(_, at)| *at > seq);
        next.map(|(at, _)| (*at - from).num_milliseconds().max(0))
    };
    let supplies = report.supplies.iter().map(|supply| SupplyReport {
        at: Timestamp(supply.at),
        kind: supply.kind.clone(),
        units: supply.units,
        seq: supply.seq,
        sold_until_next: supply.sold_until_next,
        sold_out_after_ms: again(supply.seq, supply.at),
    });
    let point = |bucket: &crate::store::reports::Bucket| Point {
        at: Timestamp(bucket.at),
        orders: bucket.orders,
        units: bucket.units,
    };
    let held: HashMap<&str, i64> = report
        .orders
        .iter()
        .filter(|row| row.accepted_as == "held")
        .map(|row| (row.status.as_str(), row.orders))
        .collect();
    let sold = i64::try_from(counters.sold).unwrap_or(i64::MAX);
    ReportView {
        sale_id: sale.id.0,
        sale_name: sale.name.clone(),
        round: round.round,
        generated_at: Timestamp(clock::now()),
        opened_at: Timestamp(report.opened_at),
        closes_at: report.closes_at.map(Timestamp),
        units: UnitsReport {
            initial: report.initial_allocation,
            allocation: counters.allocation,
            remaining: counters.remaining,
            held: counters.held,
            sold: counters.sold,
            sell_through: part(sold, i64::try_from(counters.allocation).unwrap_or(i64::MAX))
                .unwrap_or(0.0),
        },
        unit_price: report.unit_price,
        revenue: report
            .unit_price
            .times(counters.sold)
            .unwrap_or(report.unit_price),
        orders: OrdersReport {
            accepted,
            units,
            by_status,
            buyers: report.buyers,
            first_at: report.accepted.map(|(first, _)| Timestamp(first)),
            last_at: report.accepted.map(|(_, last)| Timestamp(last)),
            largest_units: report.largest_order,
            busiest_second: report.busiest.as_ref().map(point),
        },
        sold_out,
        accepted_over_time: AcceptedSeries {
            bucket_seconds: report.bucket_seconds,
            points: report.sold.iter().map(point).collect(),
        },
        demand: DemandReport {
            requests: accepted + refused,
            accepted,
            refused,
            unmet_units,
            refused_by_reason: by_reason,
            refused_over_time: RefusedSeries {
                bucket_seconds: report.refused_seconds,
                points,
            },
        },
        holds: holds(&held, report.paid),
        supply_changes: supplies.collect(),
        notes: vec![
            "Everything follows PostgreSQL: what is accepted is stored a moment later.",
            "Refusals are counted in memory and put away every three seconds: what a process had \
             counted in its last seconds is missing if it was killed. They include retries.",
        ],
    }
}

fn holds(by_status: &HashMap<&str, i64>, paid: i64) -> Option<HoldsReport> {
    let of = |status: &str| by_status.get(status).copied().unwrap_or(0);
    let held: i64 = by_status.values().sum();
    let open = of("held");
    (held > 0).then(|| HoldsReport {
        held,
        open,
        paid,
        confirmed: of("confirmed"),
        expired: of("expired"),
        cancelled: of("cancelled"),
        refunded: of("refunded"),
        withdrawn: of("withdrawn"),
        conversion: part(paid, held - open),
    })
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a rounded part of some millions"
)]
fn part(some: i64, all: i64) -> Option<f64> {
    (all > 0).then(|| (some as f64 / all as f64 * 10_000.0).round() / 10_000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_cell_is_a_formula_and_every_cell_reads_back() {
        for (text, expected) in [
            ("Lamp", "Lamp"),
            ("", ""),
            ("a,b", "\"a,b\""),
            ("say \"no\"", "\"say \"\"no\"\"\""),
            ("two\r\nlines", "\"two\r\nlines\""),
            ("=1+1", "\"'=1+1\""),
            ("+1", "\"'+1\""),
            ("-1", "\"'-1\""),
            ("@SUM(A1)", "\"'@SUM(A1)\""),
            ("\t=1", "\"'\t=1\""),
            ("\r=1", "\"'\r=1\""),
            ("1-1", "1-1"),
        ] {
            let mut out = Vec::new();
            cell(&mut out, text);
            assert_eq!(String::from_utf8(out).unwrap(), expected);
        }
    }
}
