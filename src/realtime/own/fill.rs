//! The first thing that a stream says: the buyer's orders as they are, from PostgreSQL and the end of
//! the journal.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::{Duration, Instant},
};

use tokio::time::sleep;

use super::{Desks, State, desk::ORDERS_MAX};
use crate::{
    domain::{
        id::{BuyerId, OrderId, Partition, SaleId, SaleNumber},
        order::Order,
    },
    store::orders::Newest,
};

/// Buyers that one look at PostgreSQL is for.
const BUYERS_MAX: usize = 64;

/// The time between two looks at PostgreSQL, at least: however many come, it is asked fifty times a
/// second, and by one at a time.
const REST: Duration = Duration::from_millis(20);

/// The pause while PostgreSQL or Redis does not say what is needed.
const RETRY: Duration = Duration::from_millis(500);

/// The pause while PostgreSQL has less than what was read of the journal so far.
const BEHIND: Duration = Duration::from_millis(200);

impl Desks {
    /// Shows everybody who comes what there is, for ever.
    pub(super) async fn fill(&self) {
        loop {
            // Whoever reads a journal says so while somebody waits.
            self.0.wanted.notified().await;
            loop {
                let buyers = self.state().next_wanted();
                if buyers.is_empty() {
                    break;
                }
                let pause = match self.fill_some(&buyers).await {
                    Ok(()) => REST,
                    Err(pause) => {
                        self.state().wanted.extend(buyers);
                        pause
                    }
                };
                sleep(pause).await;
            }
        }
    }

    /// Shows these buyers what there is.
    ///
    /// # Errors
    /// How long to wait before it is tried again.
    async fn fill_some(&self, buyers: &[(BuyerId, Instant)]) -> Result<(), Duration> {
        let each = i64::try_from(ORDERS_MAX).unwrap_or(i64::MAX);
        self.0.metrics.own_lookups.inc();
        let buyers: Vec<_> = buyers.iter().map(|(buyer, _)| *buyer).collect();
        let stored = self.0.orders.newest(buyers.clone(), each).await;
        let stored = stored.map_err(|error| {
            tracing::debug!(%error, "personal streams: orders not read");
            RETRY
        })?;
        let mut names: HashMap<SaleNumber, Option<(SaleId, Partition)>> = HashMap::new();
        loop {
            let unknown: Vec<_> = {
                let mut state = self.state();
                let present = state.present(&buyers, &stored).ok_or(BEHIND)?;
                let orders = present.values().flat_map(BTreeMap::values);
                let unknown: HashSet<_> = orders
                    .map(|order| order.round.sale)
                    .filter(|number| !names.contains_key(number))
                    .collect();
                if unknown.is_empty() {
                    self.install(&mut state, present, &names);
                    return Ok(());
                }
                unknown.into_iter().collect()
            };
            for number in unknown {
                let facts = self
                    .0
                    .directory
                    .by_number(number)
                    .await
                    .map_err(|_| RETRY)?;
                names.insert(number, facts.map(|facts| (facts.id, facts.partition)));
            }
        }
    }

    fn install(
        &self,
        state: &mut State,
        present: HashMap<BuyerId, BTreeMap<OrderId, Order>>,
        names: &HashMap<SaleNumber, Option<(SaleId, Partition)>>,
    ) {
        let now_ms = self.now_ms();
        for (buyer, orders) in present {
            let Some(open) = state.desks.get(&buyer) else {
                continue;
            };
            let orders = orders.into_values().filter_map(|order| {
                let (sale, _) = names.get(&order.round.sale).copied().flatten()?;
                Some((order, sale))
            });
            let (orders, mut gone, mut shown) = (orders.collect(), Vec::new(), Vec::new());
            open.desk.send_modify(|desk| {
                gone = desk.fill(orders, now_ms.unwrap_or_default());
                shown = desk.orders().copied().collect();
            });
            for id in gone {
                state.owners.remove(&id);
            }
            for order in shown {
                state.owners.insert(order.id, buyer);
                if let Some(Some((_, partition))) = names.get(&order.round.sale) {
                    state.hold(usize::from(partition.0), &order);
                }
            }
        }
    }
}

impl State {
    /// Some of those who wait for their orders: everything is read that there was when they came.
    fn next_wanted(&mut self) -> Vec<(BuyerId, Instant)> {
        let Self { wanted, desks, .. } = self;
        wanted.retain(|buyer, _| desks.contains_key(buyer));
        let waiting = self.wanted.iter().map(|(buyer, since)| (*buyer, *since));
        let some = waiting.filter(|(_, since)| self.has_read(*since));
        let some: Vec<_> = some.take(BUYERS_MAX).collect();
        for (buyer, _) in &some {
            self.wanted.remove(buyer);
        }
        some
    }

    /// The orders of these buyers as they are now; `None` when PostgreSQL and the journals that were
    /// read do not meet.
    fn present(
        &mut self,
        buyers: &[BuyerId],
        stored: &Newest,
    ) -> Option<HashMap<BuyerId, BTreeMap<OrderId, Order>>> {
        let mut present: HashMap<_, BTreeMap<_, _>> = buyers
            .iter()
            .map(|buyer| (*buyer, BTreeMap::new()))
            .collect();
        let mut owners = HashMap::new();
        for order in &stored.orders {
            present.get_mut(&order.buyer)?.insert(order.id, *order);
            owners.insert(order.id, order.buyer);
        }
        for (index, part) in self.parts.iter_mut().enumerate() {
            let recent = part.recent.as_mut()?;
            let mut positions = stored.positions.iter();
            let (_, at) = positions.find(|(partition, _)| usize::from(partition.0) == index)?;
            if !recent.goes_back_to(*at) {
                return None;
            }
            recent.catch_up(at.pseq, &mut present, &mut owners);
            recent.forget(*at);
        }
        Some(present)
    }
}
