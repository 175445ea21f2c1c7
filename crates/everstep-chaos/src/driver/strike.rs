//! Carrying faults out.

use everstep_cluster::control::{self, Injection, Reply, Request};
use nix::sys::signal::Signal;

use super::observer::Alive;
use super::ongoing::{Ongoing, Todo};
use super::{Driver, network};
use crate::process::{self, State};
use crate::proxy::http::HttpFault;
use crate::record::{FaultRecord, Victim};
use crate::scenario::{Action, Direction, Fault, Target};

impl Driver<'_> {
    /// Strikes; the reason if nothing could be struck, and then nothing was.
    pub(super) fn strike(&mut self, fault: &Fault, now: f64) -> Result<(), String> {
        match &fault.action {
            Action::Kill => self.kill(fault, now),
            Action::Pause { seconds } => self.pause(fault, *seconds, now),
            Action::StoreOutage { seconds } => self.take_store_away(fault, *seconds, now),
            Action::StoreSlow { delay_ms, seconds } => {
                let delay_ms = *delay_ms;
                self.spoil_requests(fault, HttpFault::Slow { delay_ms }, 1.0, *seconds, now)
            }
            Action::StoreErrors {
                status,
                share,
                seconds,
            } => {
                let status = *status;
                self.spoil_requests(fault, HttpFault::Refuse { status }, *share, *seconds, now)
            }
            Action::Damage { how } => self.damage(fault, *how, now),
            Action::Partition {
                direction,
                seconds,
                flap_ms,
            } => self.spoil_links(fault, *direction, network::cut(*flap_ms), *seconds, now),
            Action::Network { weather, seconds } => {
                self.spoil_links(fault, Direction::Both, (*weather).into(), *seconds, now)
            }
            Action::Inject { injection, seconds } => self.inject(fault, injection, *seconds, now),
            Action::Drain => self.drain(fault, now),
        }
    }

    fn kill(&mut self, fault: &Fault, now: f64) -> Result<(), String> {
        match &fault.target {
            Target::Agent => {
                let agent = self.agent.alive().ok_or("the agent is not alive")?;
                let orphans = self.observer.alive();
                let orphans = orphans.iter().map(|alive| alive.identity.pid);
                self.agent.goes_away(now, orphans);
                let victim = self.kill_one(agent, now).ok_or("the agent is gone")?;
                self.note(fault, now, vec![victim], Todo::SeeDeath);
            }
            Target::All => {
                let agent = self.agent.alive().ok_or("the agent is not alive")?;
                let alive = self.observer.alive();
                // What the status files do not tell of yet dies as well.
                let all = process::all_of(self.run_dir.path());
                self.agent
                    .goes_away(now, all.iter().map(|identity| identity.pid));
                // The agent first, so that it restarts nothing.
                let victims: Vec<Victim> = std::iter::once(agent)
                    .chain(alive)
                    .filter_map(|alive| self.kill_one(alive, now))
                    .collect();
                for identity in all {
                    let _ = identity.signal(Signal::SIGKILL);
                }
                self.note(fault, now, victims, Todo::SeeDeath);
            }
            Target::EveryProcessInTurn => {
                let left = self
                    .topology
                    .processes
                    .iter()
                    .map(|process| process.name.clone())
                    .collect();
                self.note(fault, now, Vec::new(), Todo::InTurn { left });
            }
            Target::LeaderAndSuccessor => {
                let after_epoch = self.observer.leader.as_ref().map_or(0, |(_, epoch)| *epoch);
                let victims = self.kill_all(fault, now)?;
                self.note(fault, now, victims, Todo::Successor { after_epoch });
            }
            _ => {
                let victims = self.kill_all(fault, now)?;
                self.note(fault, now, victims, Todo::SeeDeath);
            }
        }
        Ok(())
    }

    fn kill_all(&mut self, fault: &Fault, now: f64) -> Result<Vec<Victim>, String> {
        let victims = self.targets(&fault.target)?;
        let victims: Vec<Victim> = victims
            .into_iter()
            .filter_map(|alive| self.kill_one(alive, now))
            .collect();
        if victims.is_empty() {
            return Err(format!("no {} was alive", fault.target.label()));
        }
        Ok(victims)
    }

    /// Sends SIGKILL; none if it was gone already.
    pub(super) fn kill_one(&mut self, alive: Alive, now: f64) -> Option<Victim> {
        let was_alive = alive.identity.state() != State::Dead;
        alive.identity.signal(Signal::SIGKILL).then_some(Victim {
            process: alive.name,
            node: alive.node,
            identity: alive.identity,
            at: now,
            was_alive,
            took_effect: false,
            replaced_at: None,
        })
    }

    fn pause(&mut self, fault: &Fault, seconds: Option<f64>, now: f64) -> Result<(), String> {
        let victims: Vec<Victim> = self
            .targets(&fault.target)?
            .into_iter()
            .filter(|alive| alive.identity.signal(Signal::SIGSTOP))
            .map(|alive| Victim {
                process: alive.name,
                node: alive.node,
                identity: alive.identity,
                at: now,
                was_alive: true,
                took_effect: false,
                replaced_at: None,
            })
            .collect();
        if victims.is_empty() {
            return Err(format!("no {} was alive", fault.target.label()));
        }
        let resume_at = seconds.map(|seconds| now + seconds);
        self.note(fault, now, victims, Todo::SeeStop { resume_at });
        Ok(())
    }

    /// Asks the agent to make a process misbehave. What the agent accepts has happened; what it refuses has not.
    fn inject(
        &mut self,
        fault: &Fault,
        injection: &Injection,
        seconds: Option<f64>,
        now: f64,
    ) -> Result<(), String> {
        let victim = self
            .targets(&fault.target)?
            .pop()
            .ok_or("nobody is alive")?;
        let mut injection = injection.clone();
        if let Injection::Panic { role } = &mut injection
            && let Some(own) = self.topology.process_named(&victim.name)
            && let Some(first) = self.topology.processes[own as usize].roles.first()
            && !self.topology.processes[own as usize].roles.contains(role)
        {
            *role = *first;
        }
        self.ask(&victim.node, &victim.name, &injection)?;
        let calm = match injection {
            Injection::FlipGradientBits { .. } => Some(Injection::FlipGradientBits { share: 0.0 }),
            Injection::SlowDevice { .. } => Some(Injection::SlowDevice { delay_ms: 0 }),
            _ => None,
        };
        let todo = match (seconds, calm) {
            (Some(seconds), Some(calm)) => Todo::Calm {
                at: now + seconds,
                calm,
            },
            _ => Todo::Nothing,
        };
        let victim = Victim {
            process: victim.name,
            node: victim.node,
            identity: victim.identity,
            at: now,
            was_alive: true,
            took_effect: true,
            replaced_at: None,
        };
        self.note(fault, now, vec![victim], todo);
        if let Some(last) = self.faults.last_mut() {
            last.happened = true;
        }
        Ok(())
    }

    /// Asks the agent to drain a node; its processes leave when others have what they hold.
    fn drain(&mut self, fault: &Fault, now: f64) -> Result<(), String> {
        let Target::Node(node) = &fault.target else {
            return Err(format!("{} is no node", fault.target.label()));
        };
        let request = Request::Drain {
            node: node.clone(),
            seconds_left: None,
        };
        let victims = self.targets(&fault.target)?.into_iter();
        let victims = victims.map(|alive| Victim {
            process: alive.name,
            node: alive.node,
            identity: alive.identity,
            at: now,
            was_alive: true,
            took_effect: false,
            replaced_at: None,
        });
        let victims = victims.collect();
        self.request(node, &request)?;
        self.note(fault, now, victims, Todo::SeeLeave);
        Ok(())
    }

    /// Sends an injection to the agent of `node`.
    pub(super) fn ask(
        &self,
        node: &str,
        process: &str,
        injection: &Injection,
    ) -> Result<(), String> {
        let request = Request::Inject {
            process: process.to_owned(),
            fault: injection.clone(),
        };
        self.request(node, &request)
    }

    /// Sends a request to the agent of `node`.
    fn request(&self, node: &str, request: &Request) -> Result<(), String> {
        match control::send(&self.run_dir, node, request) {
            Ok(Reply::Done) => Ok(()),
            Ok(Reply::Refused { message }) => Err(message),
            Err(error) => Err(error.to_string()),
        }
    }

    /// The processes that the target means now, in random order where it leaves a choice.
    pub(super) fn targets(&mut self, target: &Target) -> Result<Vec<Alive>, String> {
        // Who is stopped has been struck already.
        let mut alive = self.observer.alive();
        alive.retain(|alive| alive.identity.state() == State::Running);
        let none = || format!("no {} is alive", target.label());
        match target {
            Target::Role { role, index } => {
                alive.retain(|alive| alive.roles.iter().any(|known| known == role.name()));
                let names: Vec<&str> = self
                    .topology
                    .processes
                    .iter()
                    .filter(|process| process.roles.contains(role))
                    .map(|process| process.name.as_str())
                    .collect();
                if let Some(index) = index {
                    let name = names.get(*index as usize).copied().unwrap_or_default();
                    alive.retain(|alive| alive.name == name);
                }
                self.one_of(alive).map(|one| vec![one]).ok_or_else(none)
            }
            Target::Process(name) => {
                alive.retain(|alive| alive.name == *name);
                self.one_of(alive).map(|one| vec![one]).ok_or_else(none)
            }
            Target::Any => self.one_of(alive).map(|one| vec![one]).ok_or_else(none),
            Target::Node(node) => {
                alive.retain(|alive| alive.node == *node);
                if alive.is_empty() {
                    return Err(none());
                }
                Ok(alive)
            }
            Target::Leader | Target::LeaderAndSuccessor => {
                let leader = self.observer.leader_name().ok_or("nobody leads")?;
                alive.retain(|alive| alive.name == leader);
                self.one_of(alive).map(|one| vec![one]).ok_or_else(none)
            }
            Target::ReplicasOfABlock => {
                alive.retain(|alive| alive.roles.iter().any(|role| role == "shard"));
                if alive.len() < 2 {
                    return Err("fewer than two shard processes are alive".to_owned());
                }
                let first = alive.swap_remove(self.random.below(alive.len() as u64) as usize);
                let second = alive.swap_remove(self.random.below(alive.len() as u64) as usize);
                Ok(vec![first, second])
            }
            Target::Agent | Target::All | Target::EveryProcessInTurn | Target::Store => {
                Err(format!("{} is no process", target.label()))
            }
        }
    }

    fn one_of(&mut self, mut alive: Vec<Alive>) -> Option<Alive> {
        if alive.is_empty() {
            return None;
        }
        Some(alive.swap_remove(self.random.below(alive.len() as u64) as usize))
    }

    /// Makes the fault's record.
    pub(super) fn note(&mut self, fault: &Fault, now: f64, victims: Vec<Victim>, todo: Todo) {
        self.faults.push(FaultRecord {
            label: fault.label(),
            kind: fault.action.kind().to_owned(),
            place: fault.place.clone(),
            at: now,
            until: None,
            step: self.observer.step(),
            victims,
            happened: false,
            network: None,
            requests: None,
            object: None,
            note: None,
        });
        self.ongoing.push(Ongoing {
            record: self.faults.len() - 1,
            todo,
            since: now,
        });
    }
}
