//! The files of the directory and the objects they hold. A file that is broken, empty, unreadable or just being written
//! keeps the objects it held. Time is an argument.

use super::{
    claims::{Claim, Claims, Place},
    document::{self, Content, Document},
    listing::{Listing, Stamp},
    netns::Namespaces,
    pending::Writing,
};
use crate::kubernetes::{
    index::Index,
    objects::ObjectRef,
    problem::{Finding, Flaw, Origin, Problem},
};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

/// A file that changed less than this ago may still be changing: the event that says so can be on its way.
const FRESH: Duration = Duration::from_millis(20);
/// A file that is being written is looked at again when it is closed; this is for a close that nobody tells.
const BEING_WRITTEN: Duration = Duration::from_secs(1);
/// How long the objects of a vanished file stay where one of them restricts: some editors move a file away and write it anew.
const GONE: Duration = Duration::from_millis(500);
const MAX_FILE: u64 = 16 << 20;

#[derive(Debug, Clone, Copy)]
pub(super) struct Now {
    pub(super) monotonic: Instant,
    pub(super) wall: SystemTime,
}

/// How much to look at.
#[derive(Debug)]
pub(super) enum Scope {
    /// Everything, and take each file as it is: there is nothing yet that could be kept instead.
    First,
    All,
    Paths(BTreeSet<PathBuf>),
}

#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) problems_changed: bool,
    pub(super) look_again: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct Directory {
    root: PathBuf,
    files: BTreeMap<Arc<PathBuf>, File>,
    claims: Claims,
    namespaces: Namespaces,
    /// What the index was told.
    applied: HashMap<ObjectRef, Option<Arc<Value>>>,
    /// What could not be listed, and why.
    unlisted: BTreeMap<PathBuf, String>,
    /// To be looked at again: just changed, just being written, or just gone.
    later: BTreeSet<PathBuf>,
    problems: BTreeMap<ProblemKey, Vec<Problem>>,
}

#[derive(Debug, Default)]
struct File {
    stamp: Option<Stamp>,
    holds: BTreeSet<(ObjectRef, Place)>,
    gone_since: Option<Instant>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum ProblemKey {
    File(Arc<PathBuf>),
    Twice(ObjectRef),
    Netns(ObjectRef),
    Unlisted(PathBuf),
}

impl Directory {
    pub(super) fn new(root: PathBuf, node_name: Option<Arc<str>>) -> Self {
        Self {
            root,
            files: BTreeMap::new(),
            claims: Claims::default(),
            namespaces: Namespaces::new(node_name),
            applied: HashMap::new(),
            unlisted: BTreeMap::new(),
            later: BTreeSet::new(),
            problems: BTreeMap::new(),
        }
    }

    /// Brings the index up to date with the files in `scope`. `writing` knows how far a file's writing has come.
    pub(super) fn scan(
        &mut self,
        scope: Scope,
        now: Now,
        index: &mut Index,
        writing: &dyn Fn(&Path) -> Writing,
    ) -> Outcome {
        let mut scan = Scan {
            now,
            first: matches!(scope, Scope::First),
            touched: BTreeSet::new(),
            outcome: Outcome::default(),
        };
        let later = std::mem::take(&mut self.later);
        match scope {
            Scope::First | Scope::All => {
                let listed = self.list(&mut scan);
                let known: Vec<Arc<PathBuf>> = self.files.keys().cloned().collect();
                for path in known {
                    let kept = self.unlisted.keys().any(|folder| path.starts_with(folder));
                    if !listed.contains_key(&*path) && !kept {
                        self.vanished(&path, &mut scan);
                    }
                }
                for (path, stamp) in listed {
                    self.seen(&Arc::new(path), stamp, writing, &mut scan);
                }
            }
            Scope::Paths(mut paths) => {
                paths.extend(later);
                for path in paths {
                    let path = Arc::new(path);
                    match fs::metadata(&*path) {
                        Ok(metadata) if metadata.is_file() => {
                            self.seen(&path, Stamp::of(&metadata), writing, &mut scan);
                        }
                        Ok(_) => {}
                        Err(error) if error.kind() == io::ErrorKind::NotFound => self.vanished(&path, &mut scan),
                        Err(error) => self.unreadable(&path, &error, &mut scan),
                    }
                }
            }
        }
        scan.touched.extend(self.namespaces.changed().cloned());
        for object in std::mem::take(&mut scan.touched) {
            self.tell(&object, index, &mut scan);
        }
        scan.outcome
    }

    pub(super) fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values().flatten()
    }

    pub(super) fn origin(&self, object: &ObjectRef) -> Option<Origin> {
        self.claims.winner(object).map(|(origin, _)| origin)
    }

    /// The folders in which this node's network namespaces lie.
    pub(super) fn namespace_folders(&self) -> impl Iterator<Item = &Path> {
        self.namespaces.folders()
    }

    /// Every manifest below the root. What cannot be listed is noted, and what it held stays.
    fn list(&mut self, scan: &mut Scan) -> BTreeMap<PathBuf, Stamp> {
        let Listing { files, unlisted } = Listing::of(&self.root);
        if unlisted != self.unlisted {
            scan.outcome.problems_changed = true;
            self.problems.retain(|key, _| !matches!(key, ProblemKey::Unlisted(_)));
            for (path, error) in &unlisted {
                let problem = file_problem(&Arc::new(path.clone()), Flaw::FileUnreadable(error.clone()));
                self.problems.insert(ProblemKey::Unlisted(path.clone()), vec![problem]);
            }
            self.unlisted = unlisted;
        }
        files
    }

    fn seen(&mut self, path: &Arc<PathBuf>, stamp: Stamp, writing: &dyn Fn(&Path) -> Writing, scan: &mut Scan) {
        let known = self.files.get_mut(path);
        if let Some(file) = known {
            if file.gone_since.take().is_some() {
                self.claims.set_going(path, false);
                scan.touched.extend(file.holds.iter().map(|(object, _)| object.clone()));
            }
            if file.stamp == Some(stamp) {
                return;
            }
        }
        let is_fresh = stamp.age(scan.now.wall).is_some_and(|age| age < FRESH);
        let wait = match writing(path) {
            Writing::UnderWay => Some(BEING_WRITTEN),
            Writing::Finished => None,
            Writing::Unknown => is_fresh.then_some(FRESH),
        };
        if let Some(wait) = wait.filter(|_| !scan.first) {
            self.later.insert(path.to_path_buf());
            scan.look_again_in(wait);
            return;
        }
        if stamp.bytes > MAX_FILE {
            let flaw = Flaw::FileTooLarge {
                bytes: stamp.bytes,
                limit: MAX_FILE,
            };
            self.files.entry(Arc::clone(path)).or_default().stamp = Some(stamp);
            self.set_problems(ProblemKey::File(Arc::clone(path)), vec![file_problem(path, flaw)], scan);
            return;
        }
        let bytes = match fs::read(&**path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return self.vanished(path, scan),
            Err(error) => return self.unreadable(path, &error, scan),
        };
        let after = fs::metadata(&**path).map(|metadata| Stamp::of(&metadata));
        if !scan.first && (after.ok() != Some(stamp) || writing(path) == Writing::UnderWay) {
            self.later.insert(path.to_path_buf());
            scan.look_again_in(FRESH);
            return;
        }
        self.files.entry(Arc::clone(path)).or_default().stamp = Some(stamp);
        self.take_in(path, &bytes, scan);
    }

    fn unreadable(&mut self, path: &Arc<PathBuf>, error: &io::Error, scan: &mut Scan) {
        let problem = file_problem(path, Flaw::FileUnreadable(error.to_string()));
        // Without a stamp it is tried again at the next look.
        self.files.entry(Arc::clone(path)).or_default().stamp = None;
        self.set_problems(ProblemKey::File(Arc::clone(path)), vec![problem], scan);
    }

    fn vanished(&mut self, path: &Arc<PathBuf>, scan: &mut Scan) {
        let Some(file) = self.files.get_mut(path) else { return };
        let since = *file.gone_since.get_or_insert(scan.now.monotonic);
        self.claims.set_going(path, true);
        let left = GONE.saturating_sub(scan.now.monotonic.duration_since(since));
        if !left.is_zero() && file.holds.iter().any(|(object, _)| object.kind.restricts()) {
            self.later.insert(path.to_path_buf());
            scan.look_again_in(left);
            return;
        }
        for (object, place) in std::mem::take(&mut file.holds) {
            self.claims.remove(&object, &place);
            scan.touched.insert(object);
        }
        self.files.remove(path);
        self.claims.set_going(path, false);
        self.set_problems(ProblemKey::File(Arc::clone(path)), Vec::new(), scan);
    }

    /// What a file's bytes say takes the place of what they said before.
    fn take_in(&mut self, path: &Arc<PathBuf>, bytes: &[u8], scan: &mut Scan) {
        let held = self
            .files
            .get_mut(path)
            .map(|file| std::mem::take(&mut file.holds))
            .unwrap_or_default();
        let mut problems = Vec::new();
        let documents = match std::str::from_utf8(bytes) {
            Ok(text) => document::parse(text, path.extension().is_some_and(|extension| extension == "json")),
            Err(_) => document::not_text(bytes),
        };
        // No bytes at all are the first half of a rewrite, or an accident; whoever means it deletes the file.
        let is_empty = bytes.iter().all(u8::is_ascii_whitespace) && !held.is_empty();
        if is_empty {
            problems.push(file_problem(path, Flaw::FileEmpty));
        }
        let is_broken = is_empty
            || documents
                .iter()
                .any(|document| matches!(document.content, Content::Broken { .. }));
        let mut holds: BTreeSet<(ObjectRef, Place)> = BTreeSet::new();
        let mut new: Vec<(ObjectRef, Place, Claim)> = Vec::new();
        let mut misnamed: BTreeSet<(String, String)> = BTreeSet::new();
        for (item, Document { number, line, content }) in documents.into_iter().enumerate() {
            let place = (Arc::clone(path), number, item);
            let origin = |line| {
                Some(Origin {
                    file: Arc::clone(path),
                    document: number,
                    line: Some(line),
                })
            };
            match content {
                Content::Object { object, value } => {
                    new.push((
                        object,
                        place,
                        Claim {
                            line,
                            value: Some(Arc::new(value)),
                        },
                    ));
                }
                Content::Broken {
                    object,
                    line: at,
                    finding,
                } => {
                    problems.push(Problem {
                        origin: origin(at.unwrap_or(line)),
                        object: object.clone(),
                        finding,
                    });
                    let restricts = object.filter(|object| object.kind.restricts());
                    if let Some(object) = restricts.filter(|object| !held.iter().any(|(held, _)| held == object)) {
                        new.push((object, place, Claim { line, value: None }));
                    }
                }
                Content::Foreign { named, finding } => {
                    problems.extend(finding.map(|finding| Problem {
                        origin: origin(line),
                        object: None,
                        finding,
                    }));
                    misnamed.extend(named);
                }
            }
        }
        for (object, place) in held {
            let named = (object.namespace.to_string(), object.name.to_string());
            let rewritten = new.iter().any(|(new, _, _)| *new == object);
            if !rewritten && (is_broken || misnamed.contains(&named)) {
                holds.insert((object, place));
            } else {
                self.claims.remove(&object, &place);
                scan.touched.insert(object);
            }
        }
        for (object, place, claim) in new {
            scan.touched.insert(object.clone());
            holds.insert((object.clone(), place.clone()));
            self.claims.add(object, place, claim);
        }
        if let Some(file) = self.files.get_mut(path) {
            file.holds = holds;
        }
        self.set_problems(ProblemKey::File(Arc::clone(path)), problems, scan);
    }

    /// Tells the index what an object now is.
    fn tell(&mut self, object: &ObjectRef, index: &mut Index, scan: &mut Scan) {
        self.set_problems(ProblemKey::Twice(object.clone()), self.claims.losers(object), scan);
        let (origin, value) = self.claims.winner(object).unzip();
        let there = self.namespaces.check(object, value.as_ref().and_then(Option::as_deref));
        let gone = there.err().map(|finding| Problem {
            origin,
            object: Some(object.clone()),
            finding,
        });
        let value = value.filter(|_| gone.is_none());
        self.set_problems(ProblemKey::Netns(object.clone()), Vec::from_iter(gone), scan);
        match value {
            None => {
                if self.applied.remove(object).is_some() {
                    index.delete(object);
                }
            }
            Some(value) if self.applied.get(object) == Some(&value) => {}
            Some(value) => {
                match &value {
                    Some(value) => index.apply(object, value),
                    None => index.apply_unreadable(object),
                }
                self.applied.insert(object.clone(), value);
            }
        }
    }

    fn set_problems(&mut self, key: ProblemKey, problems: Vec<Problem>, scan: &mut Scan) {
        let before = if problems.is_empty() {
            self.problems.remove(&key).unwrap_or_default()
        } else {
            self.problems.insert(key.clone(), problems).unwrap_or_default()
        };
        let now = self.problems.get(&key).map(Vec::as_slice).unwrap_or_default();
        scan.outcome.problems_changed |= before != now;
    }
}

/// One look at the directory.
struct Scan {
    now: Now,
    first: bool,
    touched: BTreeSet<ObjectRef>,
    outcome: Outcome,
}

impl Scan {
    fn look_again_in(&mut self, wait: Duration) {
        let at = self.now.monotonic + wait;
        let earlier = self.outcome.look_again.is_none_or(|before| at < before);
        if earlier {
            self.outcome.look_again = Some(at);
        }
    }
}

fn file_problem(file: &Arc<PathBuf>, flaw: Flaw) -> Problem {
    let origin = Origin {
        file: Arc::clone(file),
        document: 0,
        line: None,
    };
    Problem {
        origin: Some(origin),
        object: None,
        finding: Finding::new("", flaw),
    }
}
