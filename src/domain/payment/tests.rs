//! Every interleaving of two nodes, a bank, an expiry, lost and late calls and crashes.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use super::*;

const PRICE: i64 = 5;

/// What the bank has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Bank {
    Nothing,
    Open,
    /// Waits for the buyer.
    Action,
    Authorised,
    Captured {
        refunded: i64,
    },
    Voided,
    Declined,
}

impl Bank {
    fn seen(self) -> Option<Seen> {
        Some(match self {
            Self::Nothing => return None,
            Self::Open => Seen::Open,
            Self::Action => Seen::RequiresAction,
            Self::Authorised => Seen::Authorised,
            Self::Captured { refunded } => Seen::Captured {
                amount: PRICE,
                refunded,
            },
            Self::Voided => Seen::Voided,
            Self::Declined => Seen::Declined(Decline::Declined),
        })
    }

    /// A call reaches it: what it is then, in each way that a bank may choose.
    fn called(self, call: Call) -> Vec<Self> {
        match (self, call) {
            (Self::Nothing, Call::Open) => vec![Self::Open],
            (Self::Open, Call::Authorise) => vec![
                Self::Authorised,
                Self::Declined,
                Self::Action,
                // A method that cannot be captured by hand.
                Self::Captured { refunded: 0 },
            ],
            (Self::Authorised, Call::Capture) => vec![Self::Captured { refunded: 0 }],
            (Self::Open | Self::Action | Self::Authorised, Call::Void) => vec![Self::Voided],
            // Once for its key.
            (Self::Captured { refunded: 0 }, Call::Refund) => {
                vec![Self::Captured { refunded: PRICE }]
            }
            (same, _) => vec![same],
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Call {
    Open,
    Authorise,
    Capture,
    Void,
    Refund,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Order {
    Held,
    Confirmed,
    Expired,
    Cancelled,
}

/// Where a node is that works on the payment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Node {
    Idle,
    /// It has read the row.
    Read(Course),
    /// It has learnt something, and not written it down.
    Learnt(Course, Fact),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    row: Course,
    bank: Bank,
    order: Order,
    /// The order that was bought instead of the first.
    second: Option<Order>,
    /// Whether anything is left to buy again.
    stock: bool,
    nodes: [Node; 2],
    /// Calls that are still on their way, although nobody waits for them any more.
    network: Vec<Call>,
    /// Things that may still go wrong.
    mishaps: u8,
    /// Whether an operator may still ask for the money back.
    refundable: bool,
}

impl World {
    fn new(stock: bool, mishaps: u8) -> Self {
        Self {
            row: Course::new(PRICE),
            bank: Bank::Nothing,
            order: Order::Held,
            second: None,
            stock,
            nodes: [Node::Idle; 2],
            network: Vec::new(),
            mishaps,
            refundable: true,
        }
    }

    /// What was sold, in money.
    fn sold(&self) -> i64 {
        let one = |order: Order| i64::from(order == Order::Confirmed) * PRICE;
        one(self.order) + self.second.map_or(0, one)
    }

    /// What the bank has taken for good.
    fn taken(&self) -> i64 {
        match self.bank {
            Bank::Captured { refunded } => PRICE - refunded,
            _ => 0,
        }
    }

    /// Nobody works on it, nothing is on its way, and no hold is left to expire.
    fn is_quiet(&self) -> bool {
        self.nodes == [Node::Idle; 2] && self.network.is_empty() && self.second != Some(Order::Held)
    }

    /// Everything that may happen next.
    fn steps(&self) -> Vec<(String, Self)> {
        let mut steps = Vec::new();
        let add = |steps: &mut Vec<_>, name: String, change: &dyn Fn(&mut Self)| {
            let mut next = self.clone();
            change(&mut next);
            if next != *self {
                steps.push((name, next));
            }
        };
        if self.order == Order::Held {
            add(&mut steps, "the hold expires".to_owned(), &|w| {
                w.order = Order::Expired;
            });
            add(&mut steps, "the buyer cancels".to_owned(), &|w| {
                w.order = Order::Cancelled;
            });
        }
        if self.second == Some(Order::Held) {
            add(&mut steps, "the second hold expires".to_owned(), &|w| {
                w.second = Some(Order::Expired);
            });
        }
        if self.bank == Bank::Action {
            for bank in [Bank::Authorised, Bank::Declined, Bank::Voided] {
                add(&mut steps, format!("the buyer acts: {bank:?}"), &|w| {
                    w.bank = bank;
                });
            }
        }
        if self.bank == Bank::Authorised && self.mishaps > 0 {
            for bank in [Bank::Voided, Bank::Captured { refunded: 0 }] {
                add(&mut steps, format!("the bank alone: {bank:?}"), &|w| {
                    w.bank = bank;
                    w.mishaps -= 1;
                });
            }
        }
        // Somebody goes on at the bank after it said no.
        if self.bank == Bank::Declined && self.mishaps > 0 {
            add(&mut steps, "another card at the bank".to_owned(), &|w| {
                w.bank = Bank::Captured { refunded: 0 };
                w.mishaps -= 1;
            });
        }
        if self.row.state == State::Captured && self.refundable && self.row.refund_due == 0 {
            add(&mut steps, "an operator refunds".to_owned(), &|w| {
                // The units go back first, then the money is due.
                w.refundable = false;
                let row = w.row;
                if *w.present(row) != Order::Confirmed {
                    return;
                }
                *w.present(row) = Order::Cancelled;
                w.row = w.row.after(Fact::RefundDue(PRICE));
            });
        }
        for (place, call) in self.network.iter().enumerate() {
            for bank in self.bank.called(*call) {
                add(&mut steps, format!("late: {call:?}: {bank:?}"), &|w| {
                    w.network.remove(place);
                    w.bank = bank;
                });
            }
        }
        for node in 0..self.nodes.len() {
            match self.nodes[node] {
                Node::Idle => {
                    add(&mut steps, format!("{node} begins"), &|w| {
                        w.nodes[node] = if w.row.opened {
                            // It asks the bank before anything else.
                            match w.bank.seen() {
                                Some(seen) => Node::Learnt(w.row, Fact::Seen(seen)),
                                None => Node::Read(w.row),
                            }
                        } else {
                            Node::Read(w.row)
                        };
                    });
                }
                Node::Read(row) => {
                    let acts = self.act(node, row);
                    steps.extend(
                        acts.into_iter()
                            .map(|(name, next)| (format!("{node}: {name}"), next)),
                    );
                    if self.mishaps > 0 {
                        add(&mut steps, format!("{node} dies"), &|w| {
                            w.nodes[node] = Node::Idle;
                            w.mishaps -= 1;
                        });
                    }
                }
                Node::Learnt(row, fact) => {
                    add(&mut steps, format!("{node} writes {fact:?}"), &|w| {
                        w.nodes[node] = Node::Idle;
                        if w.row == row {
                            w.row = row.after(fact);
                            let stopped = matches!(w.row.next(), Todo::Wait | Todo::Nothing);
                            if !stopped {
                                w.nodes[node] = Node::Read(w.row);
                            }
                        }
                    });
                    if self.mishaps > 0 {
                        add(
                            &mut steps,
                            format!("{node} dies before it writes {fact:?}"),
                            &|w| {
                                w.nodes[node] = Node::Idle;
                                w.mishaps -= 1;
                            },
                        );
                    }
                }
            }
        }
        steps
    }

    /// What a node does that has read `row`.
    fn act(&self, node: usize, row: Course) -> Vec<(String, Self)> {
        let call = match row.next() {
            Todo::Open => Call::Open,
            Todo::Authorise | Todo::Wait if self.order != Order::Held => {
                return vec![self.learnt(node, row, Fact::Gone)];
            }
            Todo::Authorise => Call::Authorise,
            Todo::Capture(_) => Call::Capture,
            Todo::Void => Call::Void,
            Todo::Refund => Call::Refund,
            Todo::Wait | Todo::Nothing => {
                let mut next = self.clone();
                next.nodes[node] = Node::Idle;
                return vec![("stops".to_owned(), next)];
            }
            Todo::Confirm => {
                let mut next = self.clone();
                let order = next.present(row);
                if *order == Order::Held {
                    *order = Order::Confirmed;
                }
                let fact = match order {
                    Order::Confirmed => Fact::Confirmed(PRICE),
                    Order::Held | Order::Expired | Order::Cancelled => Fact::Gone,
                };
                next.nodes[node] = Node::Learnt(row, fact);
                return vec![(format!("confirms: {fact:?}"), next)];
            }
            Todo::BuyAgain => {
                let mut next = self.clone();
                // The same key buys once.
                if !row.again && next.order == Order::Expired && next.stock && next.second.is_none()
                {
                    next.second = Some(Order::Held);
                }
                let fact = match next.second {
                    Some(Order::Held) if !row.again => Fact::BoughtAgain,
                    _ => Fact::NotToBeHad,
                };
                next.nodes[node] = Node::Learnt(row, fact);
                return vec![(format!("buys again: {fact:?}"), next)];
            }
            Todo::Revoke => {
                let mut next = self.clone();
                if *next.present(row) == Order::Confirmed {
                    *next.present(row) = Order::Cancelled;
                }
                next.nodes[node] = Node::Learnt(row, Fact::Revoked);
                return vec![("revokes".to_owned(), next)];
            }
        };
        let mut steps = Vec::new();
        for bank in self.bank.called(call) {
            let mut next = self.clone();
            next.bank = bank;
            let fact = match (call, bank) {
                (Call::Open, _) => Fact::Opened,
                (Call::Refund, Bank::Captured { refunded: PRICE }) => Fact::Refunded(PRICE),
                (_, bank) => match bank.seen() {
                    Some(seen) => Fact::Seen(seen),
                    None => continue,
                },
            };
            let mut lost = next.clone();
            if self.mishaps > 0 {
                let mut wrong = next.clone();
                wrong.mishaps -= 1;
                wrong.nodes[node] = Node::Learnt(row, Fact::Disagrees);
                steps.push((
                    format!("{call:?}: {bank:?}, and the answer is wrong"),
                    wrong,
                ));
            }
            next.nodes[node] = Node::Learnt(row, fact);
            steps.push((format!("{call:?}: {bank:?}"), next));
            if self.mishaps > 0 {
                lost.mishaps -= 1;
                lost.nodes[node] = Node::Idle;
                steps.push((format!("{call:?}: {bank:?}, and the answer is lost"), lost));
            }
        }
        if self.mishaps > 0 {
            let mut late = self.clone();
            late.mishaps -= 1;
            late.nodes[node] = Node::Idle;
            late.network.push(call);
            late.network.sort_unstable();
            steps.push((format!("{call:?} is on its way"), late));
        }
        steps
    }

    /// The order that a node confirms or takes back by what it has read.
    fn present(&mut self, row: Course) -> &mut Order {
        match &mut self.second {
            Some(second) if row.again => second,
            _ => &mut self.order,
        }
    }

    fn learnt(&self, node: usize, row: Course, fact: Fact) -> (String, Self) {
        let mut next = self.clone();
        next.nodes[node] = Node::Learnt(row, fact);
        (format!("{fact:?}"), next)
    }
}

/// The states that are over: nothing that still happens by itself would change anything.
fn is_over(world: &World) -> bool {
    world.is_quiet()
        && world.row.next() == Todo::Nothing
        // The bank's last word has been heard: a webhook says when to ask.
        && world
            .bank
            .seen()
            .is_none_or(|seen| !world.row.opened || world.row.after(Fact::Seen(seen)) == world.row)
}

fn explore(stock: bool, mishaps: u8, moves: &mut BTreeSet<(State, State)>) -> usize {
    let first = World::new(stock, mishaps);
    let mut from: HashMap<World, Option<(String, World)>> = HashMap::new();
    let mut back: HashMap<World, Vec<World>> = HashMap::new();
    let mut queue = VecDeque::from([first.clone()]);
    from.insert(first, None);
    let mut over = Vec::new();
    while let Some(world) = queue.pop_front() {
        let told = |why: &str| -> String {
            let mut lines = vec![format!("{why}: {world:#?}")];
            let mut at = &world;
            while let Some(Some((step, before))) = from.get(at) {
                lines.push(step.clone());
                at = before;
            }
            lines.reverse();
            lines.join("\n")
        };
        let row = world.row;
        assert!(
            row.refunded + row.refund_due <= row.captured,
            "{}",
            told("gives back too much")
        );
        assert!(world.sold() <= PRICE, "{}", told("sold twice"));
        if is_over(&world) {
            assert_eq!(
                world.taken(),
                world.sold(),
                "{}",
                told("money and goods differ")
            );
            assert_eq!(
                row.captured - row.refunded,
                world.sold(),
                "{}",
                told("the row is wrong")
            );
            assert_ne!(
                world.bank,
                Bank::Authorised,
                "{}",
                told("money stays reserved")
            );
            over.push(world.clone());
        }
        for (name, next) in world.steps() {
            if next.row.state != world.row.state {
                moves.insert((world.row.state, next.row.state));
            }
            back.entry(next.clone()).or_default().push(world.clone());
            if !from.contains_key(&next) {
                from.insert(next.clone(), Some((name, world.clone())));
                queue.push_back(next);
            }
        }
    }
    // From everywhere it can come to an end: nothing is stuck.
    let mut ends: HashSet<World> = over.iter().cloned().collect();
    let mut queue: VecDeque<World> = over.into();
    while let Some(world) = queue.pop_front() {
        for before in back.get(&world).into_iter().flatten() {
            if ends.insert(before.clone()) {
                queue.push_back(before.clone());
            }
        }
    }
    let stuck = from.keys().find(|world| !ends.contains(*world));
    assert!(stuck.is_none(), "never ends: {stuck:#?}");
    from.len()
}

#[test]
fn no_interleaving_loses_money_or_goods() {
    let mut moves = BTreeSet::new();
    for (stock, mishaps) in [(true, 0), (false, 1), (true, 1), (true, 2)] {
        let worlds = explore(stock, mishaps, &mut moves);
        assert!(worlds > 1_000, "{worlds}");
    }
    // PostgreSQL lets a payment go nowhere else.
    let migration = include_str!("../../../migrations/0013_payments.sql");
    for (from, to) in moves {
        let step = format!("'{} {}'", from.as_str(), to.as_str());
        assert!(migration.contains(&step), "{step}");
    }
}

#[test]
fn words_read_back() {
    for state in State::ALL {
        assert_eq!(State::parse(state.as_str()), Some(state));
    }
    for gateway in Gateway::ALL {
        assert_eq!(Gateway::parse(gateway.as_str()), Some(gateway));
    }
    for decline in Decline::ALL {
        assert_eq!(Decline::parse(decline.as_str()), Some(decline));
    }
}
