//! What was lost: for operators, who tell the buyers.

use axum::extract::State;
use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Path, Query},
    caller::Operator,
    check::Timestamp,
    page::{Page, PageQuery, Pagination},
    problem::{Code, Problem},
    routes::{Access, Routes},
};
use crate::{
    domain::{id::OrderId, order::Durability},
    store::incidents::{Incident, Incidents, Kind, Lost},
};

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(Access::Operator, routes!(list), &[Code::Validation])
        .add(
            Access::Operator,
            routes!(get),
            &[Code::Validation, Code::NotFound],
        )
}

/// A loss of accepted orders.
#[derive(Serialize, ToSchema)]
struct IncidentView {
    id: Uuid,
    partition: u16,
    /// `accepted`: an operator went on without what is missing. `possible`: nobody lives to say
    /// whether anything is. `late`: a node reported what nobody had known of.
    #[schema(inline)]
    kind: Kind,
    /// The epoch that began without them.
    epoch: u32,
    /// The last journal entry that it has of the ones before.
    recovered_to: u64,
    /// The last entry that any node is known to have seen.
    seen_to: u64,
    /// Acceptances on the list.
    listed: u64,
    /// Those of them that came back, with their receipt or a retry of their key, and are stored.
    came_back: u64,
    /// Nodes that were gone without a last word: what only they answered is on no list.
    silent_nodes: u32,
    /// What was wrong.
    reason: String,
    /// Until when the rounds concerned only redeem receipts.
    grace_until: Option<Timestamp>,
    created_at: Timestamp,
}

impl From<Incident> for IncidentView {
    fn from(incident: Incident) -> Self {
        Self {
            id: incident.id,
            partition: incident.partition.0,
            kind: incident.kind,
            epoch: incident.epoch.0,
            recovered_to: incident.recovered_to,
            seen_to: incident.seen_to,
            listed: incident.listed,
            came_back: incident.came_back,
            silent_nodes: incident.silent_nodes,
            reason: incident.reason,
            grace_until: incident.grace_until.map(Timestamp),
            created_at: Timestamp(incident.created_at),
        }
    }
}

/// An incident with a page of its list.
#[derive(Serialize, ToSchema)]
struct IncidentDetail {
    #[serde(flatten)]
    incident: IncidentView,
    /// In order of acceptance.
    acceptances: Page<LostView>,
}

/// An accepted order that was lost.
#[derive(Serialize, ToSchema)]
struct LostView {
    order_id: Uuid,
    sale_id: Option<Uuid>,
    round: u32,
    buyer_id: Uuid,
    quantity: u64,
    /// Its place among the events of the round that were lost.
    seq: u64,
    /// The journal entry that carried it, as `epoch-number`.
    #[schema(example = "3-1017")]
    entry: String,
    /// What its acceptance said that it survives.
    #[schema(inline)]
    durability: Durability,
    accepted_at: Timestamp,
    /// Its new place, if it came back.
    came_back: Option<CameBack>,
}

/// Where a lost order stands now.
#[derive(Serialize, ToSchema)]
struct CameBack {
    seq: u64,
    accepted_at: Timestamp,
}

impl From<Lost> for LostView {
    fn from(lost: Lost) -> Self {
        let acceptance = lost.acceptance;
        Self {
            order_id: acceptance.order.0,
            sale_id: lost.sale.map(|sale| sale.0),
            round: acceptance.round.round,
            buyer_id: acceptance.buyer.0,
            quantity: acceptance.quantity,
            seq: acceptance.seq,
            entry: acceptance.at.to_string(),
            durability: acceptance.durability,
            accepted_at: Timestamp::from_ms(acceptance.accepted_at_ms),
            came_back: lost.came_back.map(|(seq, at)| CameBack {
                seq,
                accepted_at: Timestamp(at),
            }),
        }
    }
}

/// List incidents
///
/// Every loss of accepted orders there ever was, newest first.
#[utoipa::path(get, path = "/v1/incidents", tag = "incidents", params(PageQuery),
    responses((status = 200, description = "A page", body = Page<IncidentView>)))]
async fn list(
    _: Operator,
    State(incidents): State<Incidents>,
    Query(query): Query<PageQuery>,
) -> Result<axum::Json<Page<IncidentView>>, Problem> {
    let page = Pagination::<(DateTime<Utc>, Uuid)>::read(query.limit, query.cursor.as_deref())?;
    let rows = incidents.list(page.after, page.rows()).await;
    let rows = rows.map_err(|error| Problem::from(error).of_reading())?;
    let place = |row: &Incident| (row.created_at, row.id);
    Ok(axum::Json(page.page(rows, place, IncidentView::from)))
}

/// Get an incident
///
/// With the orders that were lost, as far as a node lived to list them.
#[utoipa::path(get, path = "/v1/incidents/{id}", tag = "incidents",
    params(("id" = Uuid, Path), PageQuery),
    responses((status = 200, description = "The incident", body = IncidentDetail)))]
async fn get(
    _: Operator,
    State(incidents): State<Incidents>,
    Path(id): Path<Uuid>,
    Query(query): Query<PageQuery>,
) -> Result<axum::Json<IncidentDetail>, Problem> {
    let page = Pagination::<(u64, Uuid)>::read(query.limit, query.cursor.as_deref())?;
    let incident = incidents.by_id(id).await;
    let incident = incident.map_err(|error| Problem::from(error).of_reading())?;
    let incident = incident.ok_or_else(Problem::not_found)?;
    let after = page.after.map(|(pseq, order)| (pseq, OrderId(order)));
    let rows = incidents.lost(id, after, page.rows()).await;
    let rows = rows.map_err(|error| Problem::from(error).of_reading())?;
    let place = |row: &Lost| (row.acceptance.at.pseq, row.acceptance.order.0);
    Ok(axum::Json(IncidentDetail {
        incident: incident.into(),
        acceptances: page.page(rows, place, LostView::from),
    }))
}
