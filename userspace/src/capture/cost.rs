//! What one change costs here: as much in a mesh of twenty thousand pods as in one of a thousand. Counted in entries of the
//! snapshot that somebody looks at, not in time.

use super::{
    plan::{Scope, plan},
    tables::Told,
    testing::Recorder,
};
use crate::mesh::{fixtures, map::visited};
use std::{collections::BTreeMap, sync::Arc, time::Instant};

const PODS: [usize; 2] = [1_000, 20_000];

#[test]
fn what_the_kernel_is_told_of_a_change_costs_the_same_in_a_mesh_of_any_size() {
    let costs = PODS.map(|pods| {
        let kernel = Recorder::default();
        let mut told = Told::default();
        let first = Arc::new(fixtures::large(pods));
        told.tell(&kernel, &first).unwrap();
        // Twice: the first of two changes might put off its work.
        let second = Arc::new(fixtures::with_toggled(&first, 537));
        let third = Arc::new(fixtures::with_toggled(&second, 42));
        let cost = visited(|| {
            told.tell(&kernel, &second).unwrap();
            told.tell(&kernel, &third).unwrap();
        });
        assert_eq!(
            (kernel.called("upsert_workload"), kernel.called("upsert_service")),
            (2, 0)
        );
        cost
    });
    assert!(costs[0] > 0 && costs[0] < 200, "{costs:?}");
    assert_eq!(costs[0], costs[1], "it grows with the mesh");
}

#[test]
fn a_plan_costs_what_the_own_nodes_pods_do() {
    let costs = PODS.map(|pods| {
        let mesh = fixtures::large(pods);
        visited(|| {
            let steps = plan(&mesh, Scope::Found { node: "node-0" }, &BTreeMap::new(), Instant::now());
            assert_eq!(steps.len(), 10);
        })
    });
    assert!(costs[0] < 50, "{costs:?}");
    assert_eq!(costs[0], costs[1], "it grows with the mesh");
}
