//! What all tests share.

use anyhow::Result;
use lb_tests::Cluster;
use lb_tests::control_plane::ControlPlane;

/// Two nodes in two zones.
pub(crate) struct Bed {
    pub(crate) control_plane: ControlPlane,
    pub(crate) cluster: Cluster,
}

impl Bed {
    pub(crate) fn new() -> Result<Self> {
        let cluster = Cluster::builder().nodes(2).client(true).build()?;
        let control_plane = ControlPlane::start(&cluster, cluster.client())?;
        control_plane.set_zone("n1", Some("a"))?;
        control_plane.set_zone("n2", Some("b"))?;
        Ok(Self { control_plane, cluster })
    }

    /// What the programs have logged last.
    pub(crate) fn log_tails(&self) -> String {
        self.control_plane.log_tails()
    }
}
