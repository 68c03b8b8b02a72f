//! Who comes and when: the plan of a crowd, made before the first request is sent.

use std::iter;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use uuid::Uuid;

/// How a crowd arrives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Arrivals {
    /// Everybody at the instant of the opening.
    Burst,
    /// Independently of each other (a Poisson process), so many a second on average.
    Rate(f64),
}

/// A crowd of buyers, every one with the same wish.
#[derive(Clone, Debug)]
pub(crate) struct Crowd {
    /// Different people.
    pub(crate) buyers: usize,
    /// Purchases that each of them tries.
    pub(crate) tries: usize,
    /// Units per purchase.
    pub(crate) quantity: u64,
    /// Whether a buyer's tries follow each other, so that the limit is met while there is stock; else
    /// the next one comes after everybody else's last one.
    pub(crate) greedy: bool,
    /// Sales that they spread over evenly, each buyer at one.
    pub(crate) sales: usize,
    /// Whether one sale's buyers come after the other's; else they come mixed.
    pub(crate) in_turn: bool,
    /// Requests for each purchase, at once and with the same key.
    pub(crate) copies: usize,
    /// When they come.
    pub(crate) arrivals: Arrivals,
    /// Decides everything random, so that a run can be repeated.
    pub(crate) seed: u64,
}

/// One request that the plan foresees.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Arrival {
    /// Which buyer, from 0.
    pub(crate) buyer: usize,
    /// Which purchase, from 0: copies of one have the same key.
    pub(crate) key: usize,
    /// Which sale, from 0.
    pub(crate) sale: usize,
    /// When the request is to be sent, counted from the opening.
    pub(crate) due: Duration,
}

impl Crowd {
    /// Everybody buys one unit, once, in one sale.
    pub(crate) fn once(buyers: usize, arrivals: Arrivals, seed: u64) -> Self {
        Self {
            buyers,
            tries: 1,
            quantity: 1,
            greedy: false,
            sales: 1,
            in_turn: false,
            copies: 1,
            arrivals,
            seed,
        }
    }

    /// The ids of the buyers.
    pub(crate) fn ids(&self) -> Vec<Uuid> {
        let mut random = StdRng::seed_from_u64(self.seed);
        (0..self.buyers)
            .map(|_| uuid::Builder::from_random_bytes(random.random()).into_uuid())
            .collect()
    }

    /// Every request with its instant, in order of time.
    pub(crate) fn plan(&self) -> Vec<Arrival> {
        let mut random = StdRng::seed_from_u64(self.seed ^ 0x5eed_0000_0000_0001);
        let mut due = Duration::ZERO;
        (0..self.purchases())
            .flat_map(|key| {
                if let Arrivals::Rate(per_second) = self.arrivals {
                    let gap = -(1.0 - random.random::<f64>()).ln() / per_second;
                    due += Duration::from_secs_f64(gap);
                }
                let buyer = if self.greedy {
                    key / self.tries
                } else {
                    key % self.buyers
                };
                let arrival = Arrival {
                    buyer,
                    key,
                    sale: if self.in_turn {
                        buyer / self.buyers.div_ceil(self.sales)
                    } else {
                        buyer % self.sales
                    },
                    due,
                };
                iter::repeat_n(arrival, self.copies)
            })
            .collect()
    }

    /// Different purchases.
    pub(crate) fn purchases(&self) -> usize {
        self.buyers * self.tries
    }

    /// Those who come to one of the sales.
    fn buyers_of(&self, sale: usize) -> usize {
        if self.in_turn {
            let each = self.buyers.div_ceil(self.sales);
            return self.buyers.saturating_sub(sale * each).min(each);
        }
        self.buyers / self.sales + usize::from(sale < self.buyers % self.sales)
    }

    /// Orders that a sale with this stock and limit must accept if everybody is answered; with
    /// `lost` purchases that never got an answer, at least how many.
    pub(crate) fn orders_expected(
        &self,
        sale: usize,
        stock: u64,
        limit: u64,
        lost: u64,
    ) -> (u64, u64) {
        let supply = stock / self.quantity;
        let tries = u64::try_from(self.tries).unwrap_or(u64::MAX);
        let buyers = u64::try_from(self.buyers_of(sale)).unwrap_or(u64::MAX);
        let demand = buyers.saturating_mul(tries.min(limit / self.quantity));
        (supply.min(demand.saturating_sub(lost)), supply.min(demand))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crowd(arrivals: Arrivals) -> Crowd {
        Crowd {
            tries: 2,
            quantity: 2,
            ..Crowd::once(1000, arrivals, 7)
        }
    }

    #[test]
    fn a_burst_is_due_at_the_opening() {
        let plan = crowd(Arrivals::Burst).plan();
        assert_eq!(plan.len(), 2000);
        assert!(plan.iter().all(|arrival| arrival.due == Duration::ZERO));
        assert_eq!(plan[1001].buyer, 1);
    }

    #[test]
    fn a_rate_is_kept_on_average_and_never_goes_back_in_time() {
        let plan = crowd(Arrivals::Rate(500.0)).plan();
        assert!(plan.is_sorted_by_key(|arrival| arrival.due));
        let seconds = plan[1999].due.as_secs_f64();
        assert!((3.6..4.4).contains(&seconds), "{seconds}");
    }

    #[test]
    fn the_seed_decides_everything() {
        let one = crowd(Arrivals::Rate(500.0));
        assert_eq!(one.plan(), one.clone().plan());
        assert_eq!(one.ids(), one.clone().ids());
        let other = Crowd {
            seed: 8,
            ..one.clone()
        };
        assert_ne!(one.plan(), other.plan());
        assert_ne!(one.ids(), other.ids());
    }

    #[test]
    fn copies_have_one_key_and_sales_share_the_crowd() {
        let crowd = Crowd {
            buyers: 5,
            tries: 1,
            sales: 2,
            copies: 3,
            ..crowd(Arrivals::Burst)
        };
        let keys: Vec<_> = crowd.plan().iter().map(|arrival| arrival.key).collect();
        assert_eq!(keys, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]);
        let sales: Vec<_> = crowd.plan().iter().map(|arrival| arrival.sale).collect();
        assert_eq!(sales, [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0]);
        let expected = |sale| crowd.orders_expected(sale, 100, 2, 0);
        assert_eq!((expected(0), expected(1)), ((3, 3), (2, 2)));
        let crowd = Crowd {
            copies: 1,
            in_turn: true,
            ..crowd
        };
        let sales: Vec<_> = crowd.plan().iter().map(|arrival| arrival.sale).collect();
        assert_eq!(sales, [0, 0, 0, 1, 1]);
        let expected = |sale| crowd.orders_expected(sale, 100, 2, 0);
        assert_eq!((expected(0), expected(1)), ((3, 3), (2, 2)));
    }

    #[test]
    fn the_greedy_try_again_at_once() {
        let crowd = Crowd {
            buyers: 3,
            greedy: true,
            ..crowd(Arrivals::Burst)
        };
        let buyers: Vec<_> = crowd.plan().iter().map(|arrival| arrival.buyer).collect();
        assert_eq!(buyers, [0, 0, 1, 1, 2, 2]);
    }

    #[test]
    fn expected_orders_follow_stock_demand_limit_and_losses() {
        let crowd = crowd(Arrivals::Burst);
        assert_eq!(crowd.orders_expected(0, 101, 4, 0), (50, 50));
        assert_eq!(crowd.orders_expected(0, 10_000, 4, 0), (2000, 2000));
        assert_eq!(crowd.orders_expected(0, 10_000, 3, 0), (1000, 1000));
        assert_eq!(crowd.orders_expected(0, 10_000, 1, 0), (0, 0));
        assert_eq!(crowd.orders_expected(0, 10_000, 4, 5), (1995, 2000));
        assert_eq!(crowd.orders_expected(0, 101, 4, 1980), (20, 50));
    }
}
