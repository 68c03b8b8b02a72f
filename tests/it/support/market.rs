//! A market: buyers and operators who do what they like with a few small sales, at all nodes, and
//! insist on their answers as good clients do. Everything is written down.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures::StreamExt;
use rand::{Rng, SeedableRng, rngs::StdRng};
use reqwest::{Client, Method, RequestBuilder};
use serde_json::{Value, json};
use stockade::{
    auth::{Role, token::TokenKeys},
    clock,
    domain::limits::CALL_DEADLINE_MS,
};
use tokio::{
    sync::{RwLock, RwLockWriteGuard, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use uuid::Uuid;

use super::{
    app::{Answer, App, PATIENCE, id, token},
    history::{Kind, Outcome, Recorder},
    process::stockade,
};

/// Attempts after which a client gives up for now.
const ATTEMPTS_MAX: usize = 12;

/// The shop as its clients see it.
pub(crate) struct Market {
    pub(crate) recorder: Recorder,
    pub(crate) sales: Vec<String>,
    /// The sale with holds and a line.
    holding: usize,
    /// Definite answers so far.
    pub(crate) served: AtomicU64,
    doors: Vec<watch::Receiver<String>>,
    client: Client,
    keys: Arc<TokenKeys>,
    /// Accepted and not given back, as their buyers know.
    bought: Mutex<Vec<Bought>>,
    /// Who waits in line: sale, buyer, key.
    waiting: Mutex<Vec<(usize, Uuid, String)>>,
    /// Held by everybody who is at something; who takes it alone has silence.
    noise: RwLock<()>,
}

/// The market while it is open.
pub(crate) struct Bustle {
    pub(crate) market: Arc<Market>,
    people: JoinSet<()>,
    close: watch::Sender<bool>,
}

/// An order, as its buyer knows it.
#[derive(Clone, Copy)]
struct Bought {
    sale: usize,
    who: Uuid,
    order: Uuid,
    /// Whether it had to be paid.
    held: bool,
}

/// What one client asks for, as often as it must.
#[derive(Clone, Copy)]
struct Wish<'a> {
    sale: usize,
    kind: Kind,
    who: Uuid,
    key: &'a str,
}

impl Market {
    /// A market with these many sales of thirty units, of which each buyer gets three; what the last
    /// one sells is held for a second, and there is a line.
    pub(crate) async fn found(
        app: &App,
        sales: usize,
        doors: Vec<watch::Receiver<String>>,
    ) -> Arc<Self> {
        let mut ids = Vec::new();
        for number in 1..=sales {
            let mut terms = json!({ "allocation": 30, "per_buyer_limit": 3 });
            if number == sales {
                terms["hold_seconds"] = json!(1);
                terms["waitlist"] = json!(true);
                terms["limit_scope"] = json!("sale");
            }
            ids.push(id(&app.sale(terms).await).to_owned());
        }
        Arc::new(Self {
            recorder: Recorder::default(),
            holding: sales - 1,
            sales: ids,
            served: AtomicU64::new(0),
            doors,
            client: app.client.clone(),
            keys: app.keys(),
            bought: Mutex::default(),
            waiting: Mutex::default(),
            noise: RwLock::default(),
        })
    }

    /// Lets so many buyers in, and one operator for each sale.
    pub(crate) fn open(self: &Arc<Self>, buyers: usize, seed: u64) -> Bustle {
        let (close, closing) = watch::channel(false);
        let mut people = JoinSet::new();
        for number in 0..buyers {
            let (market, closing) = (Arc::clone(self), closing.clone());
            people.spawn(async move {
                let mut random = StdRng::seed_from_u64(seed.wrapping_add(number as u64));
                while !*closing.borrow() {
                    market.visit(&mut random).await;
                    let pause = random.random_range(20..120);
                    sleep(Duration::from_millis(pause)).await;
                }
            });
        }
        for sale in 0..self.sales.len() {
            let (market, closing) = (Arc::clone(self), closing.clone());
            people.spawn(async move {
                let mut random = StdRng::seed_from_u64(!seed.wrapping_add(sale as u64));
                while !*closing.borrow() {
                    market.operate(sale, &mut random).await;
                    let pause = random.random_range(50..400);
                    sleep(Duration::from_millis(pause)).await;
                }
            });
        }
        Bustle {
            market: Arc::clone(self),
            people,
            close,
        }
    }

    /// What one buyer does who comes by.
    async fn visit(&self, random: &mut StdRng) {
        let _noise = self.noise.read().await;
        if random.random_ratio(1, 5) {
            let mine = take(&self.bought, random);
            if let Some(bought) = mine {
                self.think_again(bought, random).await;
                return;
            }
        }
        if random.random_ratio(1, 6) {
            let place = take(&self.waiting, random);
            if let Some((sale, who, key)) = place {
                self.wait(sale, who, key, random).await;
                return;
            }
        }
        // Some come again and again, until their limit; most once.
        let who = if random.random_bool(0.5) {
            Uuid::from_u128(random.random_range(1..=30))
        } else {
            Uuid::from_u128(random.random())
        };
        let quantity = random.random_range(1..=3);
        let sale = random.random_range(0..self.sales.len());
        let kind = Kind::Purchase { quantity };
        let key = format!("{:016x}", random.random::<u64>());
        let key = &key;
        let wish = Wish {
            sale,
            kind,
            who,
            key,
        };
        match self.insist(wish, random).await {
            Some(Outcome::Ok { body, .. }) => self.keep(sale, who, &body, random).await,
            Some(Outcome::Refused { code, .. })
                if code == "sold_out" && sale == self.holding && random.random_ratio(1, 3) =>
            {
                self.wait(sale, who, key.clone(), random).await;
            }
            _ => {}
        }
        // The same key again, as from another device; now and then for something else.
        if random.random_ratio(1, 4) {
            self.try_once(wish, random).await;
        }
        if random.random_ratio(1, 20) {
            let quantity = quantity % 3 + 1;
            let kind = Kind::Purchase { quantity };
            self.try_once(Wish { kind, ..wish }, random).await;
        }
    }

    /// A buyer has an order. Of those that are held, some are paid, some later or never.
    async fn keep(&self, sale: usize, who: Uuid, body: &str, random: &mut StdRng) {
        let body: Value = serde_json::from_str(body).unwrap();
        let bought = Bought {
            sale,
            who,
            order: body["id"].as_str().unwrap().parse().unwrap(),
            held: body["status"] == "held",
        };
        if bought.held && random.random_bool(0.4) {
            // Some at the last moment.
            if random.random_ratio(1, 5) {
                sleep(Duration::from_millis(random.random_range(900..1_100))).await;
            }
            self.at_order(
                bought,
                Kind::Pay {
                    order: bought.order,
                },
                random,
            )
            .await;
        }
        self.bought.lock().unwrap().push(bought);
    }

    /// A buyer pays after all, wants more time, or wants it no more.
    async fn think_again(&self, bought: Bought, random: &mut StdRng) {
        let order = bought.order;
        let kind = match random.random_range(0..4) {
            0 if bought.held => Kind::Pay { order },
            1 if bought.held => Kind::Extend { order },
            _ => Kind::Cancel { order },
        };
        self.at_order(bought, kind, random).await;
        if !matches!(kind, Kind::Cancel { .. }) {
            self.bought.lock().unwrap().push(bought);
        }
    }

    async fn at_order(&self, bought: Bought, kind: Kind, random: &mut StdRng) {
        let key = if matches!(kind, Kind::Pay { .. }) {
            "pay"
        } else {
            ""
        };
        let Bought { sale, who, .. } = bought;
        let wish = Wish {
            sale,
            kind,
            who,
            key,
        };
        self.insist(wish, random).await;
    }

    /// A buyer waits in line, asks what became of that, or leaves.
    async fn wait(&self, sale: usize, who: Uuid, key: String, random: &mut StdRng) {
        // The same whenever this key is used.
        let quantity = 1 + u64::from(key.as_bytes()[0] % 2);
        let kind = if random.random_ratio(1, 8) {
            Kind::Leave
        } else {
            Kind::Join { quantity }
        };
        let wish = Wish {
            sale,
            kind,
            who,
            key: &key,
        };
        let Some(Outcome::Ok { body, .. }) = self.insist(wish, random).await else {
            return;
        };
        match kind {
            Kind::Leave => {}
            // Served.
            _ if body.contains("\"status\"") => self.keep(sale, who, &body, random).await,
            _ => self.waiting.lock().unwrap().push((sale, who, key)),
        }
    }

    async fn operate(&self, sale: usize, random: &mut StdRng) {
        let _noise = self.noise.read().await;
        if random.random_ratio(4, 5) {
            let units = random.random_range(1..=6);
            // Mostly for nothing: it takes only what remains.
            let kind = if random.random_ratio(1, 8) {
                Kind::Reduce { units }
            } else {
                Kind::Restock { units }
            };
            let (who, key) = (clock::new_id(), "units");
            self.insist(
                Wish {
                    sale,
                    kind,
                    who,
                    key,
                },
                random,
            )
            .await;
            return;
        }
        let (who, key) = (clock::new_id(), "");
        let kind = Kind::Pause;
        self.insist(
            Wish {
                sale,
                kind,
                who,
                key,
            },
            random,
        )
        .await;
        sleep(Duration::from_millis(random.random_range(0..50))).await;
        // Somebody must open it again, however long it takes.
        loop {
            let (who, kind) = (clock::new_id(), Kind::Resume);
            if self
                .insist(
                    Wish {
                        sale,
                        kind,
                        who,
                        key,
                    },
                    random,
                )
                .await
                .is_some()
            {
                return;
            }
        }
    }

    /// Asks until there is a definite answer; none when it has been asked often enough.
    async fn insist(&self, wish: Wish<'_>, random: &mut StdRng) -> Option<Outcome> {
        for attempt in 1..=ATTEMPTS_MAX {
            if let Some(answer) = self.try_once(wish, random).await {
                return Some(answer);
            }
            let pause = random.random_range(20..100 * attempt as u64);
            sleep(Duration::from_millis(pause)).await;
        }
        None
    }

    /// Asks once, at any door, with more or less patience. None when the answer is not definite.
    async fn try_once(&self, wish: Wish<'_>, random: &mut StdRng) -> Option<Outcome> {
        let door = random.random_range(0..self.doors.len());
        let patience = Duration::from_millis(random.random_range(500..4_000));
        let outcome = self.ask(wish, door, patience).await;
        match &outcome {
            Outcome::Unknown(_) => None,
            Outcome::Refused { code, .. } if code == "unavailable" => None,
            Outcome::Ok { .. } | Outcome::Refused { .. } => {
                self.served.fetch_add(1, Relaxed);
                Some(outcome)
            }
        }
    }

    async fn ask(&self, wish: Wish<'_>, door: usize, patience: Duration) -> Outcome {
        let sale = &self.sales[wish.sale];
        let at_sale = |what: &str| format!("/v1/sales/{sale}/{what}");
        let at_order = |order: Uuid, what: &str| format!("/v1/orders/{order}/{what}");
        let (path, role, body) = match wish.kind {
            Kind::Purchase { quantity } => {
                let body = json!({ "quantity": quantity });
                (at_sale("orders"), Role::Buyer, Some(body))
            }
            Kind::Cancel { order } => (at_order(order, "cancel"), Role::Buyer, None),
            Kind::Extend { order } => (at_order(order, "extend"), Role::Buyer, None),
            Kind::Pay { order } => (at_order(order, "pay"), Role::Buyer, Some(json!({}))),
            Kind::Join { quantity } => {
                let body = json!({ "quantity": quantity });
                (at_sale("waitlist"), Role::Buyer, Some(body))
            }
            Kind::Leave => (at_sale("waitlist"), Role::Buyer, None),
            Kind::Restock { units } => {
                let body = json!({ "units": units });
                (at_sale("restock"), Role::Operator, Some(body))
            }
            Kind::Reduce { units } => {
                let body = json!({ "units": units });
                (at_sale("reduce"), Role::Operator, Some(body))
            }
            Kind::Pause => (at_sale("pause"), Role::Operator, None),
            Kind::Resume => (at_sale("resume"), Role::Operator, None),
            Kind::Close => (at_sale("close"), Role::Operator, None),
        };
        let method = if wish.kind == Kind::Leave {
            Method::DELETE
        } else {
            Method::POST
        };
        let mut request = self
            .request(door, method, &path, wish.who, role)
            .timeout(patience);
        if !wish.key.is_empty() && wish.kind != Kind::Leave {
            request = request.header("Idempotency-Key", wish.key);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let sale = sale.parse().unwrap();
        let Wish { kind, who, key, .. } = wish;
        self.recorder.ask(sale, kind, who, key, request).await
    }

    fn request(
        &self,
        door: usize,
        method: Method,
        path: &str,
        who: Uuid,
        role: Role,
    ) -> RequestBuilder {
        let url = self.doors[door].borrow().clone();
        self.client
            .request(method, format!("{url}{path}"))
            .bearer_auth(token(&self.keys, who, role))
    }

    /// Waits until everybody has done what he is at; nobody begins anything as long as this is held.
    pub(crate) async fn silence(&self) -> RwLockWriteGuard<'_, ()> {
        self.noise.write().await
    }

    /// Waits until no hold is left, and nobody waits in line for what there is: then nothing moves
    /// by itself.
    pub(crate) async fn calm(&self, app: &App) {
        let path = format!("/v1/sales/{}", self.sales[self.holding]);
        let calm = |answer: &Answer| {
            let view = answer.json();
            let served = view["waiting"] == 0 || view["remaining"] == 0;
            answer.status == 200 && view["held"] == 0 && served
        };
        app.until(&path, calm).await;
    }

    /// Whether every node answers a purchase definitely, of every sale.
    pub(crate) async fn sells(&self) -> bool {
        for sale in 0..self.sales.len() {
            for door in 0..self.doors.len() {
                let (who, key) = (clock::new_id(), "probe");
                let kind = Kind::Purchase { quantity: 1 };
                let wish = Wish {
                    sale,
                    kind,
                    who,
                    key,
                };
                match self.ask(wish, door, Duration::from_secs(5)).await {
                    Outcome::Ok { .. } => {}
                    Outcome::Refused { code, .. } if code != "unavailable" => {}
                    Outcome::Refused { .. } | Outcome::Unknown(_) => return false,
                }
            }
        }
        true
    }

    /// Waits until it sells. Where a node was killed that had seen more than anybody can tell, an
    /// operator decides to go on: whoever got an answer has what it says, as the judge will see.
    pub(crate) async fn sells_again(&self, app: &App) {
        let deciding = async {
            while !self.sells().await {
                stockade(app, &[], &["rebuild", "--accept-loss"]).await;
            }
        };
        timeout(PATIENCE, deciding).await.unwrap();
    }

    /// Waits until nothing that was asked for can still happen, then asks everything again: who has
    /// an order gets the same bytes, whoever is refused now is refused for good.
    pub(crate) async fn settle(&self, app: &App) {
        sleep(Duration::from_millis(CALL_DEADLINE_MS.unsigned_abs() + 500)).await;
        self.recorder.settle();
        let mut wishes = std::collections::BTreeMap::new();
        for attempt in self.recorder.history().attempts {
            if let Kind::Purchase { .. } = attempt.kind {
                let sale = self
                    .sales
                    .iter()
                    .position(|sale| *sale == attempt.sale.to_string());
                let place = (sale.unwrap(), attempt.who, attempt.key);
                let answered = matches!(attempt.outcome, Outcome::Ok { .. });
                let (kind, known) = wishes.entry(place).or_insert((attempt.kind, false));
                if answered && !*known {
                    (*kind, *known) = (attempt.kind, true);
                }
            }
        }
        let asking = wishes
            .iter()
            .map(|((sale, who, key), (kind, _))| async move {
                let wish = Wish {
                    sale: *sale,
                    kind: *kind,
                    who: *who,
                    key,
                };
                let mut random = StdRng::seed_from_u64(who.as_u64_pair().1);
                let answer = self.insist(wish, &mut random).await;
                assert!(answer.is_some(), "no definite answer for {who} {key}");
            });
        futures::stream::iter(asking)
            .buffer_unordered(32)
            .collect::<()>()
            .await;
        self.calm(app).await;
    }
}

/// One of them, no longer there.
fn take<T>(from: &Mutex<Vec<T>>, random: &mut StdRng) -> Option<T> {
    let mut from = from.lock().unwrap();
    let number = from.len();
    (number > 0).then(|| from.swap_remove(random.random_range(0..number)))
}

impl Bustle {
    /// Lets nobody in any more, and waits until the last one has gone.
    pub(crate) async fn close(self) {
        self.close.send_replace(true);
        self.people.join_all().await;
    }
}
