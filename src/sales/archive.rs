//! Which orders have left Redis with archived rounds, eight bytes of each: a purchase in a later
//! round asks PostgreSQL only for a key that may have one, and is sold also while PostgreSQL is away.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::Semaphore, time::sleep};

use crate::{
    domain::id::{OrderId, SaleNumber},
    store::orders::Orders,
};

/// Orders that a node keeps of all sales together: about 16 bytes each. PostgreSQL is asked for the
/// others.
const ORDERS_MAX: usize = 1_000_000;

/// The least time between two readings.
const PAUSE: Duration = Duration::from_secs(1);

/// The orders of archived rounds. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Archive {
    orders: Orders,
    sales: Arc<Mutex<HashMap<SaleNumber, Gone>>>,
    /// One sale is read at a time.
    turn: Arc<Semaphore>,
}

/// What has left of a sale: no order of its archived rounds is missing.
#[derive(Debug)]
struct Gone {
    rounds: u32,
    /// `None` for too many.
    ids: Option<HashSet<u64>>,
}

impl Archive {
    /// One that knows nothing yet.
    pub fn new(orders: Orders) -> Self {
        Self {
            orders,
            sales: Arc::default(),
            turn: Arc::new(Semaphore::new(1)),
        }
    }

    /// How many archived rounds of its sale certainly do not have this order; `None` when one may
    /// have it, or nobody knows: then PostgreSQL must be asked. At least `rounds` are archived.
    pub(super) fn rounds_without(&self, order: OrderId, rounds: u32) -> Option<u32> {
        let sale = order.sale();
        {
            let sales = self.sales.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(gone) = sales.get(&sale).filter(|gone| gone.rounds >= rounds) {
                let ids = gone.ids.as_ref()?;
                return (!ids.contains(&order.prefix())).then_some(gone.rounds);
            }
        }
        // Somebody reads already: of this sale, or it has its turn at a later purchase.
        if let Ok(turn) = Arc::clone(&self.turn).try_acquire_owned() {
            let this = self.clone();
            tokio::spawn(async move {
                this.read(sale).await;
                sleep(PAUSE).await;
                drop(turn);
            });
        }
        None
    }

    async fn read(&self, sale: SaleNumber) {
        let (rounds, ids) = match self.orders.archived(sale, ORDERS_MAX).await {
            Ok(archived) => archived,
            Err(error) => {
                tracing::debug!(sale = sale.0, %error, "the orders of archived rounds cannot be read");
                return;
            }
        };
        let ids: Option<HashSet<u64>> =
            ids.map(|ids| ids.into_iter().map(OrderId::prefix).collect());
        let size = |ids: &Option<HashSet<u64>>| ids.as_ref().map_or(0, HashSet::len);
        let mut sales = self.sales.lock().unwrap_or_else(PoisonError::into_inner);
        let kept: usize = sales.values().map(|gone| size(&gone.ids)).sum();
        if kept + size(&ids) > ORDERS_MAX {
            // Those that are still asked for come back.
            sales.clear();
        }
        sales.insert(sale, Gone { rounds, ids });
    }
}
